"""Keeps moving averages of a stage's weights: one update an optimizer step, saved and restored with the run."""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import lightning as L
from torch import Tensor
from typing_extensions import override

from sdtrain.callback.log import off_the_clock
from sdtrain.checkpoint.commit import commit
from sdtrain.checkpoint.files import count_bytes, is_average, write_averages
from sdtrain.errors import ConfigError
from sdtrain.optim.averaging import Exponential, Power, exponent_of
from sdtrain.optim.ema import EMA as Average


class EMA(L.Callback):
    """Averages the learned weights of a stage; `stage.averaged_weights()` then uses them. The raw weights resume.

    Args:
        decay: of an exponential average, per optimizer step; null for `lengths`.
        lengths: of power-function averages, as shares of training; the first is used, the others are kept beside it.
        snapshot_every_steps: how often power-function averages are also kept in DIR/<stage>/ema for good, so that
            tools/ema.py makes any length of them; null keeps those in the checkpoints.
    """

    def __init__(
        self, decay: float | None = None, lengths: Sequence[float] = (), snapshot_every_steps: int | None = None
    ) -> None:
        if (decay is None) == (not lengths):
            raise ConfigError(f"ema: decay={decay} and lengths={list(lengths)}: give one, and the other as null or []")
        if decay is not None and not 0 <= decay < 1:
            raise ConfigError(f"ema: decay={decay} must be from 0 on and below 1")
        if snapshot_every_steps is not None and (snapshot_every_steps < 1 or not lengths):
            raise ConfigError(f"ema: snapshot_every_steps={snapshot_every_steps} must be 1 or more, and needs lengths")
        if len({f"{length:.3f}" for length in lengths}) < len(lengths):
            raise ConfigError(f"ema: lengths={list(lengths)} must differ in the third decimal")
        for length in lengths:
            exponent_of(length)
        self.profiles = [Power(length) for length in lengths] or [Exponential(decay)]
        self.snapshot_every_steps = snapshot_every_steps
        self._saved: dict[str, Mapping[str, Tensor]] = {}
        self._is_restored = False
        self._last_step = -1

    @override
    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Goes on from the saved averages. A fit that was done already comes no further than here."""
        self._start(pl_module)

    @override
    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Where nothing was saved they start here, from weights that every strategy has restored by now."""
        if not self._is_restored:
            self._start(pl_module)
        self._last_step = trainer.global_step
        if trainer.is_global_zero:
            for path in (pl_module.context.directory / "ema").glob("step_*"):
                if int(path.name[5:13]) > trainer.global_step:  # of a line that was given up: resume=never, a rollback
                    shutil.rmtree(path)

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, *_: object) -> None:
        """Unchanged by accumulation: only a new optimizer step counts."""
        step = trainer.global_step
        if step != self._last_step:
            self._last_step = step
            if not pl_module.is_left_out:
                pl_module.ema.update()
            if self.snapshot_every_steps is not None and step % self.snapshot_every_steps == 0:
                with off_the_clock(trainer, "averages"):
                    self._snapshot(trainer, pl_module)

    @override
    def on_save_checkpoint(self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]) -> None:
        """Becomes ema.safetensors, and ema_0.100.safetensors of a second length."""
        checkpoint |= pl_module.ema.state_dict(is_kept=trainer.is_global_zero)

    @override
    def on_load_checkpoint(self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]) -> None:
        """Runs before `on_fit_start` or, in some strategies, after it."""
        self._saved = {name: averages for name, averages in checkpoint.items() if is_average(name)}

    def _start(self, pl_module: L.LightningModule) -> None:
        pl_module.ema = Average(pl_module.averaged_parameters(), self.profiles)
        self._is_restored, saved, self._saved = bool(self._saved), self._saved, {}
        if saved:  # else the run before had no average
            pl_module.ema.load_state_dict(saved)

    def _snapshot(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        averages = pl_module.ema.state_dict(is_kept=trainer.is_global_zero)
        if trainer.is_global_zero:
            context, step = pl_module.context, trainer.global_step
            place = context.directory / "ema" / f"step_{step:08d}"
            meta = {"step": step, "config_hash": context.config_hash}
            commit(place, partial(write_averages, averages), meta, count_bytes(averages))
