"""`tracker=none`: metrics.jsonl alone, no mirror."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any


class NullTracker:
    """Writes nothing. Also what every rank but the first one holds."""

    def start(self, run_directory: Path, name: str, stage: str, config: Mapping[str, Any]) -> None:
        pass

    def log(self, row: Mapping[str, Any]) -> None:
        pass

    def image(
        self, name: str, path: Path, step: int, captions: Sequence[str] = (), pictures: Sequence[Any] = ()
    ) -> None:
        pass

    def finish(self, summary: Mapping[str, Any]) -> None:
        pass
