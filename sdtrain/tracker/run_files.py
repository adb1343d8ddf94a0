"""What a run directory holds, for the pages that tell of it."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from sdtrain.tracker.chart import Point
from sdtrain.tracker.headline import is_number
from sdtrain.tracker.jsonl import current_rows, read_rows, row_kind

PLACE_KEYS = {"stage", "step", "images", "time", "seconds", "event"}
ASKED = {"eval": "", "guidance": None, "sampler": None, "num_steps": None, "seed": 0, "weights": "ema"}  # by default


@dataclass
class RunFiles:
    """What a run directory holds; whatever is missing or unreadable is empty."""

    directory: Path
    written: list[dict[str, Any]] = field(default_factory=list)  # every row; `rows` are those that still hold
    rows: list[dict[str, Any]] = field(default_factory=list)
    summary: Mapping[str, Any] = field(default_factory=dict)
    manifest: Mapping[str, Any] = field(default_factory=dict)
    config: str = ""

    @classmethod
    def read(cls, directory: Path) -> RunFiles:
        metrics = directory / "metrics.jsonl"
        written = read_rows(metrics) if metrics.is_file() else []
        return cls(
            directory,
            written,
            current_rows(written),
            read_json(directory / "summary.json"),
            read_json(directory / "autoencoder" / "manifest.json"),
            _text(directory / "config.yaml"),
        )

    @property
    def name(self) -> str:
        found = re.search(r"^name:\s*['\"]?([^'\"\n]+)", self.config, re.MULTILINE)
        return found.group(1).strip() if found else self.directory.resolve().name

    @property
    def stages(self) -> list[str]:
        """In the order they were run."""
        written = [str(row["stage"]) for row in self.rows if row.get("stage")]
        drawn = sorted(path.parent.name for path in self.directory.glob("*/samples"))
        return list(dict.fromkeys([*written, *drawn]))

    @property
    def evaluations(self) -> dict[str, dict[str, Any]]:
        """The figures of tools/evaluate.py by what was asked for, the last ones of each, with the step they are of."""
        found = {}
        for row in (row for row in self.written if row.get("event") == "evaluation"):
            asked = {key: row.get(key, default) for key, default in ASKED.items()}
            name = str(asked.pop("eval")).rpartition("_step_")[0]
            told = [f"{key.replace('_', ' ')} {value}" for key, value in asked.items() if value != ASKED[key]]
            figures = {key: value for key, value in row.items() if key not in {*ASKED, *PLACE_KEYS - {"step"}}}
            found[", ".join([name, *told, f"{row.get('num_pictures')} pictures"])] = figures
        return found

    def curves(self, stage: str) -> tuple[dict[str, list[Point]], dict[str, list[Point]]]:
        """(step, value) pairs of each numeric key: of the training rows, and of those that are neither that nor
        events."""
        rows = [row for row in self.rows if row.get("stage") == stage]
        train = [row for row in rows if row_kind(row) == "train"]
        return _columns(train), _columns([row for row in rows if row_kind(row) not in ("train", "event")])


def read_json(path: Path) -> Mapping[str, Any]:
    """The object in the file, an empty one where there is none."""
    try:
        found = json.loads(_text(path))
    except ValueError:
        return {}
    return found if isinstance(found, Mapping) else {}


def _text(path: Path) -> str:
    return path.read_text(encoding="utf-8", errors="replace") if path.is_file() else ""


def _columns(rows: list[dict[str, Any]]) -> dict[str, list[Point]]:
    columns: dict[str, list[Point]] = {}
    for row in rows:
        for key, value in row.items():
            if key not in PLACE_KEYS and is_number(value) and is_number(row.get("step")):
                columns.setdefault(key, []).append((row["step"], float(value)))
    return columns
