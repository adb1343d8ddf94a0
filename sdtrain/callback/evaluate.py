"""Figures on held-out data while a stage trains."""

from __future__ import annotations

import time
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from typing_extensions import override

from sdtrain.callback.every import EverySteps
from sdtrain.callback.log import off_the_clock


class Evaluate(EverySteps):
    """Every `every_steps` optimizer steps, and at the last one, the module's figures with the averaged weights; with
    the trained ones, too, what the module says of those.
    """

    def __init__(self, every_steps: int) -> None:
        super().__init__(every_steps)
        self.last_figures: dict[str, float] = {}
        self.last_step = -1  # at which they were measured

    @override
    def act(self, trainer: Trainer, pl_module: LightningModule) -> None:
        started = time.perf_counter()
        with off_the_clock(trainer, "validation"):
            with pl_module.averaged_weights():
                figures = pl_module.evaluate() | pl_module.compare()
            if pl_module.ema is not None:
                figures |= pl_module.evaluate_raw()
        self.last_figures, self.last_step = figures, trainer.global_step
        if trainer.is_global_zero and self.last_figures:
            pl_module.context.tracker.log(
                {
                    "stage": pl_module.context.stage,
                    "step": trainer.global_step,
                    "images": pl_module.images_seen,
                    **self.last_figures,
                    "evaluation_seconds": round(time.perf_counter() - started, 3),
                }
            )

    @override
    def state_dict(self) -> dict[str, Any]:
        return {"last_figures": dict(self.last_figures)}

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.last_figures = dict(state_dict["last_figures"])
