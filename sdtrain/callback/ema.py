"""Keeps the exponential moving average of a stage's weights: one update an optimizer step, saved and restored with
the run.
"""

from __future__ import annotations

from typing import Any

import lightning as L
import torch
from typing_extensions import override

from sdtrain.optim.ema import EMA as Average


class EMA(L.Callback):
    """Averages the learned weights of a stage; `stage.averaged_weights()` then uses them. The raw weights resume.

    Args:
        decay: per optimizer step.
    """

    def __init__(self, decay: float = 0.9999) -> None:
        self.decay = decay
        self._saved: dict[str, Any] | None = None
        self._last_step = -1

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Starts from the current weights, or goes on from the saved average."""
        pl_module.ema = Average(pl_module.averaged_parameters(), self.decay)
        if self._saved is not None:
            pl_module.ema.load_state_dict(self._saved)
            self._saved = None
        self._last_step = trainer.global_step

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, *_: object) -> None:
        """Unchanged by accumulation: only a new optimizer step counts."""
        if trainer.global_step != self._last_step:
            self._last_step = trainer.global_step
            pl_module.ema.update()

    @override
    def on_save_checkpoint(self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]) -> None:
        """Becomes ema.safetensors."""
        checkpoint["ema"] = {k: v.detach().to("cpu", copy=True) for k, v in pl_module.ema.state_dict().items()}

    @override
    def on_load_checkpoint(self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]) -> None:
        """Runs before `on_fit_start`; kept until then."""
        if "ema" in checkpoint:  # else the run before had no average: it starts here
            self._saved = {k: torch.as_tensor(v) for k, v in checkpoint["ema"].items()}
