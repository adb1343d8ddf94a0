"""Histograms of what a step of stage 2 trains on: the timesteps that were drawn, and the whitened latents."""

from __future__ import annotations

from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor
from typing_extensions import override

from sdtrain.callback.every import EverySteps
from sdtrain.callback.log import off_the_clock

TIMESTEPS = (0.0, 1.0, 20)  # low, high, number of bins
LATENTS = (-4.0, 4.0, 32)  # of standard deviations; the outer bins also count what lies beyond


class Histogram(EverySteps):
    """Every `every_steps` optimizer steps, and at the last one, a row of `histogram/timestep` and `histogram/latent`:
    {low, high, counts} of the step's last micro-batch, over all ranks.

    Both are functions of the samples' numbers, so they are made again here from the batch; training steps do nothing.
    """

    def __init__(self, every_steps: int = 1000) -> None:
        super().__init__(every_steps)
        self._batch: Any = None

    @override
    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self._batch = batch
        super().on_train_batch_end(trainer, pl_module, outputs, batch, batch_idx)
        self._batch = None

    @override
    def act(self, trainer: Trainer, pl_module: LightningModule) -> None:
        with off_the_clock(trainer, "histograms"), torch.no_grad(), pl_module.precision():
            draw = pl_module.draw(self._batch)
            times = pl_module.objective.timestep(draw, pl_module.objective.path)
            drawn = {"timestep": (times, TIMESTEPS), "latent": (pl_module.latents(self._batch, draw), LATENTS)}
            counted = torch.cat([counts(values, *bins) for values, bins in drawn.values()])
            if trainer.world_size > 1:
                counted = trainer.strategy.reduce(counted, reduce_op="sum")
            each = counted.split([num for _, (_, _, num) in drawn.values()])
            row = {"stage": pl_module.context.stage, "step": trainer.global_step, "images": pl_module.images_seen}
            for (name, (_, (low, high, _))), told in zip(drawn.items(), each):
                row[f"histogram/{name}"] = {"low": low, "high": high, "counts": told.tolist()}
        if trainer.is_global_zero:
            pl_module.context.tracker.log(row)


def counts(values: Tensor, low: float, high: float, num_bins: int) -> Tensor:
    """How many lie in each of equal bins, (num_bins,) int64 on their device; what lies outside is in the outer ones."""
    places = ((values.detach().float().flatten() - low) * (num_bins / (high - low))).floor().long()
    places = places.clamp(0, num_bins - 1)
    return torch.zeros(num_bins, dtype=torch.int64, device=values.device).scatter_add_(
        0, places, torch.ones_like(places)
    )
