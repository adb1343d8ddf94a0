"""The rank that the others wait for: its own work on a step takes it longer."""

from __future__ import annotations

import statistics
import time
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor
from typing_extensions import override

from sdtrain.callback.every import EverySteps

_LEAST_SHARE = 0.1  # of a step's time: whoever costs less is not worth a word


class Straggler(EverySteps):
    """Every `every_steps` optimizer steps the ranks compare what a step took each of them before it met the others:
    the wait for its data and the forward. The slowest is named where it took more than `factor` times the median.

    The time of a whole step says nothing: in the backward's collectives all ranks wait for the slowest. The first step,
    which warms up, does not count, and half a window at the end is too short to tell.
    """

    def __init__(self, every_steps: int = 50, factor: float = 1.5) -> None:
        super().__init__(every_steps)
        self.factor = factor
        self._own_seconds = self._paused = 0.0
        self._opened = self._batch_end = 0.0
        self._window_step = 0
        self._is_warm = False
        self._events: list[tuple[torch.cuda.Event, torch.cuda.Event]] = []

    @override
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        super().on_train_start(trainer, pl_module)
        self._batch_end, self._paused, self._is_warm = time.perf_counter(), 0.0, False
        self._open_window(trainer)

    @override
    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        now = time.perf_counter()
        self._own_seconds += now - self._batch_end - self._paused
        self._started = now
        if trainer.strategy.root_device.type == "cuda":
            self._events.append((torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)))
            self._events[-1][0].record()

    @override
    def on_before_backward(self, trainer: Trainer, pl_module: LightningModule, loss: Tensor) -> None:
        if self._events:
            self._events[-1][1].record()
        else:
            self._own_seconds += time.perf_counter() - self._started

    @override
    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        super().on_train_batch_end(trainer, pl_module, outputs, batch, batch_idx)
        if not self._is_warm and trainer.global_step > self._window_step:
            self._is_warm = True
            self._open_window(trainer)
        self._batch_end, self._paused = time.perf_counter(), 0.0

    def pause(self, seconds: float) -> None:
        self._paused += seconds

    @override
    def act(self, trainer: Trainer, pl_module: LightningModule) -> None:
        num_steps = trainer.global_step - self._window_step
        if trainer.world_size > 1 and self._is_warm and num_steps >= self.every_steps // 2:
            if self._events:
                torch.cuda.synchronize(trainer.strategy.root_device)
            forward_seconds = sum(start.elapsed_time(end) for start, end in self._events) / 1000
            own = torch.tensor((self._own_seconds + forward_seconds) / num_steps, device=trainer.strategy.root_device)
            seconds = trainer.strategy.all_gather(own).flatten().tolist()  # (ranks,)
            if trainer.is_global_zero:
                self._tell(trainer, seconds, (time.perf_counter() - self._opened) / num_steps)
        self._open_window(trainer)

    def _tell(self, trainer: Trainer, seconds: list[float], step_seconds: float) -> None:
        slowest, median = max(seconds), statistics.median_low(seconds)
        if slowest <= self.factor * median or slowest - median <= _LEAST_SHARE * step_seconds:
            return
        rank, context = seconds.index(slowest), trainer.lightning_module.context
        print(
            f"slow: rank {rank} takes {slowest:.3g} s for its data and forward of a step, the median {median:.3g} s",
            flush=True,
        )
        place = {"stage": context.stage, "step": trainer.global_step, "event": "straggler"}
        context.tracker.log({**place, "rank": rank, "seconds": slowest, "median_seconds": median})

    def _open_window(self, trainer: Trainer) -> None:
        self._window_step, self._opened, self._own_seconds = trainer.global_step, time.perf_counter(), 0.0
        self._events.clear()
