"""`tracker=csv`: the numbers of each stage as a table, for spreadsheets; metrics.jsonl stays the truth."""

from __future__ import annotations

import csv
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TextIO

from sdtrain.tracker.row import numbers


class CsvTracker:
    """DIR/<stage>/metrics.csv, a line a row: training rows and those of evaluations, whose cells are empty in others.

    A column that comes later is added to the lines before by writing the file anew, beside it and then in its place. A
    run that goes on appends, so steps that it does again stand there twice, as in metrics.jsonl.
    """

    def __init__(self) -> None:
        self._path = Path()
        self._columns: list[str] = []
        self._file: TextIO | None = None

    def start(self, run_directory: Path, name: str, stage: str, config: Mapping[str, Any]) -> None:  # noqa: ARG002
        self._path = run_directory / stage / "metrics.csv"
        self._path.parent.mkdir(parents=True, exist_ok=True)
        lines = _whole_lines(self._path)
        self._columns = lines[0] if lines else []
        self._write(lines[1:])

    def log(self, row: Mapping[str, Any]) -> None:
        found = numbers(row)
        if self._file is None or not found:
            return
        if not found.keys() <= set(self._columns):
            lines = _whole_lines(self._path)[1:]
            self._columns += [key for key in found if key not in self._columns]
            self._write(lines)
        csv.writer(self._file, lineterminator="\n").writerow([found.get(key, "") for key in self._columns])

    def image(
        self, name: str, path: Path, step: int, captions: Sequence[str] = (), pictures: Sequence[Any] = ()
    ) -> None:
        """A table has no pictures; they lie in DIR/<stage>/samples."""

    def finish(self, summary: Mapping[str, Any]) -> None:  # noqa: ARG002 it stands in summary.json
        if self._file is not None:
            self._file.close()
            self._file = None

    def _write(self, lines: list[list[str]]) -> None:
        """The file anew, with the columns as they are now, then open for more."""
        self.finish({})
        part = self._path.with_suffix(".csv.tmp")
        with part.open("w", encoding="utf-8", newline="") as file:
            width = len(self._columns)
            padded = ([*line, *[""] * (width - len(line))] for line in lines)
            csv.writer(file, lineterminator="\n").writerows([self._columns, *padded] if width else [])
        os.replace(part, self._path)
        self._file = self._path.open("a", encoding="utf-8", newline="", buffering=1)


def _whole_lines(path: Path) -> list[list[str]]:
    """The cells of every line but one that a crash cut off."""
    text = path.read_text(encoding="utf-8") if path.is_file() else ""
    return list(csv.reader(text[: text.rfind("\n") + 1].splitlines()))
