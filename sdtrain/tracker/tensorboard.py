"""`tracker=tensorboard`: a mirror in TensorBoard's event files; metrics.jsonl stays the truth."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from sdtrain.errors import ConfigError
from sdtrain.tracker.redact import without_secrets
from sdtrain.tracker.row import edges, histograms, numbers

_PLACE = {"step", "images"}


class TensorboardTracker:
    """DIR/tensorboard/<stage>: curves, histograms, grids with their captions, alerts, the config and the summary.

    A run that goes on from a checkpoint hides what it had written after it.

    Raises:
        ConfigError: where the package is not installed.
    """

    def __init__(self) -> None:
        if importlib.util.find_spec("tensorboard") is None:
            raise ConfigError(
                "tracker=tensorboard needs the package tensorboard, which is an extra: pip install sdtrain[tensorboard]"
            )
        self._directory = Path()
        self._config: Mapping[str, Any] = {}
        self._step = 0
        self._writer: Any = None

    def start(self, run_directory: Path, name: str, stage: str, config: Mapping[str, Any]) -> None:  # noqa: ARG002
        self._directory, self._config, self._step = run_directory / "tensorboard" / stage, config, 0

    def log(self, row: Mapping[str, Any]) -> None:
        if row.get("event") == "start":
            self._open(row["step"])
        writer, self._step = self._opened(), row.get("step", self._step)
        if row.get("event") in ("start", "alert"):
            told = {key: value for key, value in row.items() if key not in {"event", "stage", "step", "images"}}
            writer.add_text(row["event"], _code(told), self._step)
        for key, value in numbers(row).items():
            if key not in _PLACE:
                writer.add_scalar(key, value, self._step)
        for key, value in histograms(row).items():
            _add_histogram(writer, key, value, self._step)
        writer.flush()

    def image(
        self,
        name: str,
        path: Path,
        step: int,
        captions: Sequence[str] = (),
        pictures: Sequence[Any] = (),  # noqa: ARG002 the grid holds them
    ) -> None:
        import numpy as np
        from PIL import Image

        with Image.open(path) as picture:
            self._opened().add_image(name, np.asarray(picture.convert("RGB")), step, dataformats="HWC")
        self._opened().add_text(f"{name}/captions", "\n".join(f"1. {caption}" for caption in captions), step)

    def finish(self, summary: Mapping[str, Any]) -> None:
        if self._writer is None:
            return
        writer, self._writer = self._writer, None
        if summary:
            writer.add_text("summary", _code(summary), self._step)
        writer.close()

    def _opened(self) -> Any:  # noqa: ANN401 a SummaryWriter
        if self._writer is None:
            self._open(0)
        return self._writer

    def _open(self, step: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self.finish({})
        self._writer = SummaryWriter(self._directory, purge_step=step + 1 if step else None)
        self._writer.add_text("config", _code(without_secrets(dict(self._config))), step)


def _code(tree: Mapping[str, Any]) -> str:
    """As Markdown, which indents what is shown as it stands."""
    return "\n".join(f"    {line}" for line in json.dumps(tree, indent=2, default=str).splitlines())


def _add_histogram(writer: Any, key: str, value: Mapping[str, Any], step: int) -> None:  # noqa: ANN401
    limits, counts = edges(value), value["counts"]
    centres = [(low + high) / 2 for low, high in zip(limits, limits[1:])]
    writer.add_histogram_raw(
        key,
        min=value["low"],
        max=value["high"],
        num=sum(counts),
        sum=sum(count * centre for count, centre in zip(counts, centres)),
        sum_squares=sum(count * centre**2 for count, centre in zip(counts, centres)),
        bucket_limits=limits[1:],
        bucket_counts=counts,
        global_step=step,
    )
