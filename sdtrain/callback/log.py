"""The training rows: loss, learning rates, speed, data wait, memory. Between them nothing asks the device."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from typing_extensions import override

from sdtrain.callback.every import EverySteps
from sdtrain.callback.mfu import MFU
from sdtrain.callback.straggler import Straggler
from sdtrain.callback.watchdog import Watchdog
from sdtrain.ops.memory import peak_memory_bytes

# What a row says beside its place, the means, the learning rates and the gradients' norms.
COLUMNS = {"images_per_second", "mfu", "step_seconds", "data_wait_fraction", "data_wait_seconds", "seconds"}
COLUMNS |= {"lr", "peak_memory_bytes", "peak_device_memory_bytes"}
MOST_LOOKING, SHORT_SECONDS = 0.03, 600  # above this share, and beyond this time, a stage says what looking took


@contextmanager
def off_the_clock(trainer: Trainer, phase: str = "callback") -> Iterator[None]:
    """Time inside (evaluation, samples, checkpoints) is not counted as training time by any `Log` of this trainer, nor
    taken for a hang of a step by its `Watchdog`.

    A callback that does more than a step's own work wraps it in this. What the device still owes to training is
    waited for first, so that it is not counted as the callback's.
    """
    if trainer.strategy.root_device.type == "cuda":
        torch.cuda.synchronize(trainer.strategy.root_device)
    started = time.perf_counter()
    with ExitStack() as stack:
        for callback in trainer.callbacks:
            if isinstance(callback, Watchdog):
                stack.enter_context(callback.phase(phase))
        try:
            yield
        finally:
            seconds = time.perf_counter() - started
            for callback in trainer.callbacks:
                if isinstance(callback, Log | Straggler):
                    callback.pause(seconds)
                if isinstance(callback, Log):
                    callback.looked(phase, seconds)


class Log(EverySteps):
    """Every `every_steps` optimizer steps, and at the last one, a row of the means since the row before.

    Speed is images over the time since the row before, less what `off_the_clock` took. Data wait is the time from the
    end of one batch to the start of the next: an upper limit where the device still works through its queue.

    What `off_the_clock` took is the cost of looking: it stands in the summary by phase, and a stage of which it took
    more than 3 % says so.
    """

    def __init__(self, every_steps: int) -> None:
        super().__init__(every_steps)
        self.last_row: dict[str, Any] | None = None
        self._looking_seconds: dict[str, float] = {}  # by phase, of all processes of this stage
        self._seconds_before = 0.0  # spent in this stage by the processes before this one
        self._started: float | None = None
        self._window_start = self._batch_end = 0.0
        self._window_images = self._window_step = 0
        self._paused = self._paused_since_batch = self._waited = 0.0
        self._rates: list[tuple[str, Any]] = []

    @override
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        super().on_train_start(trainer, pl_module)
        self._started = self._batch_end = time.perf_counter()
        self._paused_since_batch = 0.0
        self._open_window(trainer, pl_module)

    @override
    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        self._waited += time.perf_counter() - self._batch_end - self._paused_since_batch
        self._rates = _learning_rates(trainer)  # now: after the step the schedule has moved on

    @override
    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        super().on_train_batch_end(trainer, pl_module, outputs, batch, batch_idx)
        self._batch_end, self._paused_since_batch = time.perf_counter(), 0.0

    @override
    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """A fit that ends between two rows still tells what it did since the last one."""
        if trainer.global_step > self._window_step:
            self.act(trainer, pl_module)
        share = self.summary()["looking"]["share"]
        if trainer.is_global_zero and share > MOST_LOOKING and self._elapsed_seconds() > SHORT_SECONDS:
            told = ", ".join(f"{phase} {seconds:.0f} s" for phase, seconds in self._looking_seconds.items())
            line = f"looking took {share:.1%} of the time ({told}); raise callback.*.every_steps"
            self.warn(trainer, pl_module, line)

    @override
    def act(self, trainer: Trainer, pl_module: LightningModule) -> None:
        metrics = pl_module.take_metrics()  # all ranks; it waits for the device, so the clock is read after it
        seconds = max(time.perf_counter() - self._window_start - self._paused, 1e-9)
        num_steps = max(trainer.global_step - self._window_step, 1)
        num_images = pl_module.images_seen - self._window_images
        shares = [callback.of(num_images, seconds) for callback in trainer.callbacks if isinstance(callback, MFU)]
        self.last_row = {
            "stage": pl_module.context.stage,
            "step": trainer.global_step,
            "images": pl_module.images_seen,
            **metrics,
            **{name: float(rate) for name, rate in self._rates},
            "images_per_second": round(num_images / seconds, 3),
            **{name: share for found in shares for name, share in found.items()},
            "step_seconds": round(seconds / num_steps, 6),
            "data_wait_fraction": round(min(max(self._waited / seconds, 0.0), 1.0), 4),
            "data_wait_seconds": round(max(self._waited, 0.0), 3),
            "seconds": round(self._elapsed_seconds(), 3),
            **_peak_memory_bytes(trainer),
        }
        if trainer.is_global_zero:
            pl_module.context.tracker.log(self.last_row)
        self._open_window(trainer, pl_module)

    def pause(self, seconds: float) -> None:
        self._paused += seconds
        self._paused_since_batch += seconds

    def looked(self, phase: str, seconds: float) -> None:
        """So much time was spent on something else than training."""
        self._looking_seconds[phase] = self._looking_seconds.get(phase, 0.0) + seconds

    def summary(self) -> dict[str, Any]:
        """The cost of looking: seconds by phase, and their share of the stage's time, over all its processes."""
        share = sum(self._looking_seconds.values()) / max(self._elapsed_seconds(), 1e-9)
        seconds = {phase: round(spent, 3) for phase, spent in self._looking_seconds.items()}
        return {"looking": {"seconds": seconds, "share": round(share, 4)}}

    @override
    def state_dict(self) -> dict[str, Any]:
        return {"seconds": self._elapsed_seconds(), "looking_seconds": dict(self._looking_seconds)}

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._seconds_before = float(state_dict["seconds"])
        self._looking_seconds = dict(state_dict.get("looking_seconds", {}))  # older checkpoints have none

    def _open_window(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._window_start = time.perf_counter()
        self._window_images, self._window_step = pl_module.images_seen, trainer.global_step
        self._paused = self._waited = 0.0

    def _elapsed_seconds(self) -> float:
        return self._seconds_before + (time.perf_counter() - self._started if self._started is not None else 0.0)


def _learning_rates(trainer: Trainer) -> list[tuple[str, Any]]:
    """("lr/<group>", rate) of each parameter group, or ("lr", rate) of a single one that has no name."""
    groups = [group for optimizer in trainer.optimizers for group in optimizer.param_groups]
    if len(groups) == 1 and "name" not in groups[0]:
        return [("lr", groups[0]["lr"])]
    return [(f"lr/{group.get('name', index)}", group["lr"]) for index, group in enumerate(groups)]


def _peak_memory_bytes(trainer: Trainer) -> dict[str, int]:
    peak = {"peak_memory_bytes": peak_memory_bytes()}
    if trainer.strategy.root_device.type == "cuda":
        peak["peak_device_memory_bytes"] = torch.cuda.max_memory_allocated(trainer.strategy.root_device)
    return peak
