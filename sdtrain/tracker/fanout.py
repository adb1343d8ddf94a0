"""One tracker in front of many: metrics.jsonl first, then mirrors that can neither stop nor hang the run."""

from __future__ import annotations

import contextlib
import queue
import sys
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from sdtrain.contracts import Tracker

MAX_WAITING_CALLS = 4096


class Fanout:
    """Writes to `jsonl` in place, where errors are fatal, and to each mirror through a queue and a thread of its own.

    A mirror that raises, falls thousands of rows behind or does not finish in time is named on stderr, and dropped.
    """

    def __init__(self, jsonl: Tracker, mirrors: Sequence[Tracker] = (), finish_timeout_seconds: float = 60.0) -> None:
        self._jsonl = jsonl
        self._mirrors = [_Mirror(mirror) for mirror in mirrors]
        self._finish_timeout_seconds = finish_timeout_seconds

    def start(self, run_directory: Path, name: str, stage: str, config: Mapping[str, Any]) -> None:
        """A stage begins: mirrors open their run. `config` is a plain tree without secrets."""
        for mirror in self._mirrors:
            mirror.call("start", run_directory, name, stage, config)

    def log(self, row: Mapping[str, Any]) -> None:
        self._jsonl.log(row)
        for mirror in self._mirrors:
            mirror.call("log", dict(row))

    def image(
        self, name: str, path: Path, step: int, captions: Sequence[str] = (), pictures: Sequence[Any] = ()
    ) -> None:
        self._jsonl.image(name, path, step, captions)
        for mirror in self._mirrors:
            mirror.call("image", name, path, step, list(captions), pictures)

    def finish(self, summary: Mapping[str, Any]) -> None:
        """A stage is over: everything is written out, within a bounded time. `start` may follow for the next one."""
        self._jsonl.finish(summary)
        for mirror in self._mirrors:
            mirror.finish(summary, self._finish_timeout_seconds)


class _Mirror:
    """A tracker that is called from a thread, so that a stuck service costs the training loop nothing."""

    def __init__(self, tracker: Tracker) -> None:
        self._tracker = tracker
        self._calls: queue.Queue[tuple[str, tuple[Any, ...], threading.Event | None]] = queue.Queue(MAX_WAITING_CALLS)
        self._alive = True
        self._thread = threading.Thread(target=self._work, name=type(tracker).__name__, daemon=True)
        self._thread.start()

    def call(self, method: str, *arguments: Any, done: threading.Event | None = None) -> None:
        if not self._alive:
            return
        try:
            self._calls.put_nowait((method, arguments, done))
        except queue.Full:
            self._drop(f"it is {MAX_WAITING_CALLS} rows behind")

    def finish(self, summary: Mapping[str, Any], timeout_seconds: float) -> None:
        done = threading.Event()
        self.call("finish", summary, done=done)
        if self._alive and not done.wait(timeout_seconds):
            self._drop(f"it did not finish in {timeout_seconds:g} s")
        if not self._alive:
            self._abandon()

    def _work(self) -> None:
        while self._alive:
            method, arguments, done = self._calls.get()
            try:
                getattr(self._tracker, method)(*arguments)
            except BaseException as error:  # noqa: BLE001  a mirror may call sys.exit, too
                self._drop(f"{type(error).__name__}: {error}")
            if done is not None:
                done.set()

    def _drop(self, reason: str) -> None:
        if self._alive:
            self._alive = False
            first_line = (reason.splitlines() or [""])[0]
            name = type(self._tracker).__name__
            print(f"warning: {name} is dropped: {first_line} (metrics.jsonl goes on)", file=sys.stderr, flush=True)

    def _abandon(self) -> None:
        """A dropped tracker may leave a service whose exit hook never returns: its `abandon`, if any, ends that."""
        with contextlib.suppress(Exception):
            if hasattr(self._tracker, "abandon"):
                self._tracker.abandon()
