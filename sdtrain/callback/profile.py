"""Where the time of a training step goes, by torch's profiler."""

from __future__ import annotations

from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch.profiler import ProfilerActivity, profile


class Profile(Callback):
    """Profiles some steps of rank 0: DIR/<stage>/profile.txt, by operator, and profile.json, a trace for Perfetto.

    Args:
        first_step: optimizer steps before it are left out: first calls compile and allocate.
        num_steps: how many are profiled.
    """

    def __init__(self, first_step: int = 5, num_steps: int = 5) -> None:
        self.first_step, self.last_step = first_step, first_step + num_steps
        self._profiler: profile | None = None
        self._is_done = False

    def on_train_batch_start(self, trainer: Trainer, *_: Any) -> None:  # noqa: ANN401 Lightning's signature
        """Begin with the first micro-batch of the first step."""
        if trainer.is_global_zero and trainer.global_step >= self.first_step and not (self._is_done or self._profiler):
            activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * torch.cuda.is_available()
            self._profiler = profile(activities=activities, record_shapes=True)
            self._profiler.start()

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:  # noqa: ANN401
        """End after the last micro-batch of the last step."""
        if self._profiler and trainer.global_step >= self.last_step:
            self._write(pl_module)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:  # noqa: ARG002
        """A stage that is shorter than the profile still leaves one."""
        if self._profiler:
            self._write(pl_module)

    def _write(self, pl_module: LightningModule) -> None:
        self._profiler.stop()
        directory = pl_module.context.directory
        directory.mkdir(parents=True, exist_ok=True)
        by = "self_cuda_time_total" if torch.cuda.is_available() else "self_cpu_time_total"
        table = self._profiler.key_averages().table(sort_by=by, row_limit=40)
        (directory / "profile.txt").write_text(table)
        self._profiler.export_chrome_trace(str(directory / "profile.json"))
        print(f"profile: {directory / 'profile.txt'}", flush=True)
        self._profiler, self._is_done = None, True
