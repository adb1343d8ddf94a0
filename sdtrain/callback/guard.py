"""The non-finite guard: a loss or gradient that is not a number ends the run before it reaches a checkpoint."""

from __future__ import annotations

import json
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor
from torch.nn.utils import get_total_norm
from typing_extensions import override

from sdtrain.contracts import Batch
from sdtrain.errors import ConfigError, RunError


class Guard(Callback):
    """Notes on the device whether each loss and gradient norm is finite; reads the notes every `check_every_steps`.

    The notes are also read, and the weights looked at, before any checkpoint is saved. All ranks decide together.
    """

    def __init__(self, check_every_steps: int = 10) -> None:
        if check_every_steps < 1:
            raise ConfigError(f"guard: check_every_steps={check_every_steps} must be at least 1")
        self.check_every_steps = check_every_steps
        self._checked_step = 0
        self._notes: list[tuple[int, str, Tensor]] = []  # step, what, is it finite (on the device)
        self._sample_ids: dict[int, list[Tensor]] = {}  # of each step since the last check

    @override
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._checked_step = trainer.global_step

    @override
    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Batch, batch_idx: int) -> None:
        self._sample_ids.setdefault(trainer.global_step + 1, []).append(batch["sample_id"])

    @override
    def on_before_backward(self, trainer: Trainer, pl_module: LightningModule, loss: Tensor) -> None:
        self._notes.append((trainer.global_step + 1, "loss", loss.detach().isfinite().all()))

    @override
    def on_before_optimizer_step(
        self, trainer: Trainer, pl_module: LightningModule, optimizer: torch.optim.Optimizer
    ) -> None:
        if getattr(trainer.precision_plugin, "scaler", None) is not None:
            return  # fp16: the scaler skips such a step and lowers its scale
        gradients = [parameter.grad for parameter in pl_module.parameters() if parameter.grad is not None]
        if gradients:  # DeepSpeed keeps them to itself
            self._notes.append((trainer.global_step + 1, "gradient", get_total_norm(gradients).isfinite()))

    @override
    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if trainer.global_step - self._checked_step >= self.check_every_steps:
            self._check(trainer)

    @override
    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        for name, parameter in pl_module.named_parameters():
            self._notes.append((trainer.global_step, f"parameter {name}", parameter.detach().isfinite().all()))
        self._check(trainer)

    @override
    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._check(trainer)

    def _check(self, trainer: Trainer) -> None:
        is_finite = not self._notes or bool(torch.stack([finite for _, _, finite in self._notes]).all())
        if not trainer.strategy.reduce_boolean_decision(is_finite):
            self._stop(trainer)
        self._checked_step = trainer.global_step
        self._notes.clear()
        self._sample_ids.clear()

    def _stop(self, trainer: Trainer) -> None:
        context, rank = trainer.lightning_module.context, trainer.global_rank
        bad = [(step, what) for step, what, finite in self._notes if not finite]
        step, what = bad[0] if bad else (trainer.global_step, "a value on another rank (see nonfinite_rank*.json)")
        sample_ids = torch.cat(self._sample_ids[step]).tolist() if step in self._sample_ids else []
        path = context.directory / ("nonfinite.json" if rank == 0 else f"nonfinite_rank{rank}.json")
        window = [min(self._checked_step + 1, step), trainer.global_step]
        report = {"stage": context.stage, "step": step, "what": what, "window": window, "sample_id": sample_ids}
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(report))
        context.tracker.log({"stage": context.stage, "step": step, "event": "nonfinite", "what": what})
        raise RunError(
            f"not finite: {what} at step {step} (steps {window[0]} to {window[1]} were checked together); "
            f"samples {sample_ids[:8]}{'...' if len(sample_ids) > 8 else ''}, all in {path}; "
            "nothing non-finite was saved: lower the learning rate or look at these samples, then run it again",
            76,
        )
