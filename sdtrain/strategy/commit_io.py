"""Lightning's checkpoints through the commit protocol."""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from threading import Thread
from typing import Any, NamedTuple

import torch
from lightning.pytorch.plugins.io import CheckpointIO
from torch import Tensor
from typing_extensions import override

from sdtrain.checkpoint import commit, files


class Saving(NamedTuple):
    """How one save is done. It travels as Lightning's `storage_options`.

    Args:
        prune: deletes older checkpoints once this one is committed, and returns what names those that stay.
        in_background: only the copy to the host is waited for.
    """

    prune: Callable[[Path], list[str]] | None = None
    in_background: bool = False


class Saved(NamedTuple):
    """What a save took."""

    step: int
    num_bytes: int
    stall_seconds: float  # for which training stood still
    seconds: float  # until the commit


class CommitIO(CheckpointIO):
    """Saves all or nothing and loads only what is verified; `checkpoint["sdtrain"]` goes into COMPLETE.json."""

    def __init__(self) -> None:
        self._line: list[str] = []  # manifest hashes of the checkpoints this process continues from, newest last
        self._thread: Thread | None = None
        self._failure: BaseException | None = None
        self._saved: Saved | None = None
        self._host: dict[str, Tensor] = {}

    @override
    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any = None) -> None:
        self.save(checkpoint, Path(path), Saving(**storage_options or {}))

    def save(
        self,
        checkpoint: dict[str, Any],
        path: Path,
        saving: Saving,
        rank: int = 0,
        exchange: Callable[[Any], list[Any]] = lambda own: [own],
    ) -> None:
        """Commits, alone or with other ranks, after what is still being saved.

        Raises:
            ConfigError: where this cannot be saved, or could not what was being saved.
        """
        self.wait()
        started = time.perf_counter()
        if not saving.in_background:
            self._commit(checkpoint, path, saving, rank, exchange)
            took = time.perf_counter() - started
            self._saved = Saved(checkpoint["global_step"], _num_bytes(path), took, took) if rank == 0 else None
            return
        copied = self._to_host(checkpoint)
        stall = time.perf_counter() - started

        def work() -> None:
            try:
                self._commit(copied, path, saving)
                self._saved = Saved(checkpoint["global_step"], _num_bytes(path), stall, time.perf_counter() - started)
            except BaseException as error:
                self._failure = error

        self._thread = Thread(target=work, name="checkpoint")
        self._thread.start()

    def _commit(
        self,
        checkpoint: Mapping[str, Any],
        path: Path,
        saving: Saving,
        rank: int = 0,
        exchange: Callable[[Any], list[Any]] = lambda own: [own],
    ) -> None:
        parent = self._line[-1] if self._line else ""
        meta = {
            "step": checkpoint["global_step"],
            **checkpoint.get("sdtrain", {}),
            "parent": parent,
            "line": self._line,
        }
        write = partial(files.write, checkpoint, rank=rank)
        commit.commit(path, write, meta, files.count_bytes(checkpoint), rank, exchange)
        if rank == 0:
            self._line = saving.prune(path) if saving.prune else [*self._line, commit.manifest_hash(path)]

    def wait(self) -> Saved | None:
        """Until nothing is being saved; gives each save once.

        Raises:
            ConfigError: where it could not be saved.
        """
        if self._thread is not None:
            self._thread.join()
        return self.poll()

    def poll(self) -> Saved | None:
        """As `wait`, without waiting."""
        if self._thread is not None and self._thread.is_alive():
            return None
        self._thread, failure, self._failure = None, self._failure, None
        if failure is not None:
            raise failure
        saved, self._saved = self._saved, None
        return saved

    @override
    def teardown(self) -> None:
        if self._thread is not None:
            self._thread.join()

    @override
    def load_checkpoint(
        self, path: str | Path, map_location: Any = None, weights_only: bool | None = None
    ) -> dict[str, Any]:
        commit.verify_once(Path(path))
        self._line = [*commit.read_manifest(Path(path)).get("line", []), commit.manifest_hash(Path(path))]
        return files.read(Path(path), map_location or "cpu")

    @override
    def remove_checkpoint(self, path: str | Path) -> None:
        shutil.rmtree(path)

    def _to_host(self, state: Any, name: str = "") -> Any:  # noqa: ANN401 any part of a checkpoint
        """A copy that training does not write to, in memory that stays for the next save."""
        if isinstance(state, Tensor):
            kept = self._host.get(name)
            if kept is None or kept.shape != state.shape or kept.dtype != state.dtype:
                pinned = state.device.type == "cuda"
                kept = self._host[name] = torch.empty(state.shape, dtype=state.dtype, pin_memory=pinned)
            return kept.copy_(state.detach())
        if isinstance(state, Mapping):
            return {key: self._to_host(value, f"{name}/{key}") for key, value in state.items()}
        if isinstance(state, list | tuple):
            return type(state)(self._to_host(value, f"{name}/{number}") for number, value in enumerate(state))
        return state


def _num_bytes(path: Path) -> int:
    return sum(file["bytes"] for file in commit.read_manifest(path)["files"].values())
