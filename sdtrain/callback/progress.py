"""How far the stage is: one live line on a terminal, plain lines in a file."""

from __future__ import annotations

import sys
import time
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from rich.console import Console
from rich.progress import BarColumn, TextColumn
from rich.progress import Progress as Bar
from typing_extensions import override

from sdtrain.callback.log import Log

REFRESH_SECONDS = 0.2


class Progress(Callback):
    """Shows what is about to be done, then what `Log` wrote last; it never asks the device itself. Without a terminal:
    a line at most every 10 s.
    """

    def __init__(self, every_seconds: float = 10.0) -> None:
        self.every_seconds = every_seconds
        self._bar: Bar | None = None
        self._first_row: dict[str, Any] | None = None
        self._shown_row: dict[str, Any] | None = None
        self._shown_at = float("-inf")

    @override
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._first_row = self._shown_row = None
        self._shown_at = float("-inf")
        if trainer.is_global_zero:
            for line in plan(trainer, pl_module):
                print(f"{_title(pl_module)}  {line}", flush=True)
        if trainer.is_global_zero and sys.stdout.isatty():
            self._bar = _live_bar()
            self._bar.add_task(_title(pl_module), total=trainer.max_steps, completed=trainer.global_step, figures="")
            self._bar.start()

    @override
    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if trainer.is_global_zero:
            self._show(trainer, pl_module)

    @override
    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.is_global_zero:
            self._show(trainer, pl_module, last=True)
        self._close()

    @override
    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        self._close()

    def _show(self, trainer: Trainer, pl_module: LightningModule, last: bool = False) -> None:
        row = next((callback.last_row for callback in trainer.callbacks if isinstance(callback, Log)), None)
        self._first_row = self._first_row or row
        now = time.monotonic()
        if self._bar is not None:
            if last or now - self._shown_at >= REFRESH_SECONDS:
                text = "  ".join(figures(self._first_row, row, trainer.max_steps))
                self._bar.update(self._bar.task_ids[0], completed=trainer.global_step, figures=text)
                self._bar.refresh()
                self._shown_at = now
        elif row is not None and row is not self._shown_row and (last or now - self._shown_at >= self.every_seconds):
            step = f"step {row['step']}/{trainer.max_steps}"
            line = [_title(pl_module), step, *figures(self._first_row, row, trainer.max_steps)]
            print("  ".join(line), flush=True)
            self._shown_row, self._shown_at = row, now

    def _close(self) -> None:
        if self._bar is not None:
            self._bar.stop()
            self._bar = None


def plan(trainer: Trainer, pl_module: LightningModule) -> list[str]:
    """What learns, what is gone through, and where: a line each."""
    context, world, num_accumulate = pl_module.context, trainer.world_size, trainer.accumulate_grad_batches
    learned, num_frozen = pl_module.count_parameters()
    model = [f"{name} {short(num)}" for name, num in learned.items() if num]
    model += [f"{short(num_frozen)} frozen"] if num_frozen else []
    if pl_module.flops_per_image:
        model.append(f"{short(pl_module.flops_per_image, 'FLOP')} an image")
    batch, num_train = context.global_batch_size, getattr(trainer.datamodule, "num_train", 0)
    images = trainer.max_steps * batch
    epochs = f", {images / num_train:.3g} epochs of {num_train}" if num_train else ""
    device = trainer.strategy.root_device
    device_name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    return [
        f"parameters: {', '.join(model)}",
        f"steps {trainer.global_step} to {trainer.max_steps}: {images} images{epochs}; a step has {batch} = "
        f"{batch // (world * num_accumulate)} x {num_accumulate} accumulated x {world} ranks",
        f"on {world} x {device_name}, {trainer.precision}, {type(trainer.strategy).__name__}; in {context.directory}",
    ]


def short(value: float, unit: str = "") -> str:
    """860 M, 1.53 GFLOP."""
    for prefix in ("", "k", "M", "G"):
        if value < 999.5:
            return f"{value:.3g} {prefix}{unit}".rstrip()
        value /= 1000
    return f"{value:.3g} T{unit}"


def figures(first_row: dict[str, Any] | None, row: dict[str, Any] | None, max_steps: int) -> list[str]:
    """("loss 0.123", "412 images/s", "eta 1m20s") of a row; `first_row` is where the warm-up ended."""
    if first_row is None or row is None:
        return []
    seconds = eta_seconds(first_row, row, max_steps)
    speed = row["images_per_second"]
    shown = [f"loss {row['loss']:.4g}"] if "loss" in row else []
    shown.append(f"{speed:.0f} images/s" if speed >= 10 else f"{speed:.2g} images/s")
    return [*shown, f"eta {duration(seconds)}"] if seconds > 0 else shown


def eta_seconds(first_row: dict[str, Any], row: dict[str, Any], max_steps: int) -> float:
    """Remaining steps at the pace since the first row of this process, evaluations and samples included.

    The first row covers the warm-up (workers, compilation, caches), so it only opens the window.
    """
    num_steps = row["step"] - first_row["step"]
    pace = (row["seconds"] - first_row["seconds"]) / num_steps if num_steps > 0 else row["step_seconds"]
    return max(0.0, (max_steps - row["step"]) * pace)


def duration(seconds: float) -> str:
    """7s, 1m20s, 3h12m, 2d04h."""
    minutes, rest = divmod(int(seconds + 0.5), 60)
    hours, minutes = divmod(minutes, 60)
    days, hours = divmod(hours, 24)
    if days:
        return f"{days}d{hours:02d}h"
    if hours:
        return f"{hours}h{minutes:02d}m"
    return f"{minutes}m{rest:02d}s" if minutes else f"{rest}s"


def _title(pl_module: LightningModule) -> str:
    context = pl_module.context
    return f"{context.stage} {context.stage_index}/{context.num_stages}"


def _live_bar() -> Bar:
    """Refreshed by hand: a refresh thread would hold the console's lock when a data worker is forked."""
    return Bar(
        TextColumn("[bold]{task.description}"),
        BarColumn(bar_width=24),
        TextColumn("step {task.completed}/{task.total}"),
        TextColumn("{task.fields[figures]}", style="cyan"),
        console=Console(file=sys.stdout),
        auto_refresh=False,
    )
