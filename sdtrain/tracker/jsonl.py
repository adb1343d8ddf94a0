"""metrics.jsonl: one JSON object a line. It is the truth of a run; every other tracker is a mirror of it."""

from __future__ import annotations

import json
import math
import os
import threading
import time
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, TextIO


class JsonlTracker:
    """Appends rows to a file, a line at a time. Its errors are fatal: a run that cannot be recorded is not one."""

    def __init__(self, path: Path | str) -> None:
        self.path = Path(path)
        self._file: TextIO | None = None
        self._lock = threading.Lock()  # a watching thread tells of a stall in the training's place

    def log(self, row: Mapping[str, Any]) -> None:
        row = {**row, "time": row.get("time", round(time.time(), 3))}
        line = json.dumps(_plain(row), ensure_ascii=False, allow_nan=False) + "\n"
        with self._lock:
            if self._file is None:
                self.path.parent.mkdir(parents=True, exist_ok=True)
                _cut_torn_line(self.path)
                self._file = self.path.open("a", encoding="utf-8", buffering=1)
            self._file.write(line)

    def image(
        self,
        name: str,
        path: Path,
        step: int,
        captions: Sequence[str] = (),
        pictures: Sequence[Any] = (),  # noqa: ARG002 the grid holds them
    ) -> None:
        if path.is_relative_to(self.path.parent):
            path = path.relative_to(self.path.parent)
        self.log({"event": "image", "name": name, "step": step, "path": path, "captions": list(captions)})

    def finish(self, summary: Mapping[str, Any]) -> None:  # noqa: ARG002
        """Put what was written on the disk. A later `log` opens the file again."""
        if self._file is not None:
            os.fsync(self._file.fileno())
            self._file.close()
            self._file = None


def read_rows(path: Path | str) -> list[dict[str, Any]]:
    """Every row of the file in the order written. A line that is not an object (torn by a crash) is passed over."""
    rows = []
    for line in Path(path).read_text(encoding="utf-8", errors="replace").split("\n"):
        try:
            row = json.loads(line)
        except ValueError:
            continue
        if isinstance(row, dict):
            rows.append(row)
    return rows


def current_rows(rows: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """The rows that still hold, in the order written.

    A run that crashed at step 140 and resumed from step 100 writes steps 101 to 140 again. A row is superseded when a
    later one of its stage and kind stands at the same step or an earlier one. Events happened, and all stay.
    """
    kept = []
    reached: dict[tuple[Any, str], float] = {}
    for row in reversed(list(rows)):
        step, key = row.get("step"), (row.get("stage"), row_kind(row))
        if "event" not in row and isinstance(step, int | float):
            if step >= reached.get(key, math.inf):
                continue
            reached[key] = step
        kept.append(row)
    return kept[::-1]


def row_kind(row: Mapping[str, Any]) -> str:
    """What a row tells: "event", "train", or the first part of its namespaced keys, such as "val"."""
    if "event" in row:
        return "event"
    if "loss" in row:
        return "train"
    return next((key.split("/")[0] for key in row if "/" in key), "train")


def _cut_torn_line(path: Path) -> None:
    """A line that a crash cut off would swallow the next row. It is removed before anything is appended."""
    if not path.is_file():
        return
    with path.open("rb+") as file:
        content = file.read()
        if content and not content.endswith(b"\n"):
            file.truncate(content.rfind(b"\n") + 1)


def _plain(value: Any) -> Any:
    """JSON has no NaN and no infinity: they become null. Tensors and numpy scalars become numbers, paths text."""
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if hasattr(value, "item") and getattr(value, "ndim", 1) == 0:
        value = value.item()
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return str(value) if isinstance(value, Path) else value
