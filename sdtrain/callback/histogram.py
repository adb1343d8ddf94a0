"""Histograms: the times and latents that a step of stage 2 trains on, and the posterior that stage 1 has learned."""

from __future__ import annotations

import math
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor
from typing_extensions import override

from sdtrain.callback.every import EverySteps
from sdtrain.callback.log import off_the_clock

# Low, high, number of bins; the outer ones also count what lies beyond.
BINS = {
    "timestep": (0.0, 1.0, 20),
    "latent": (-4.0, 4.0, 32),  # standard deviations
    "posterior_log_variance": (-30.0, 20.0, 50),  # an encoder's are clamped to these
}
NUM_BINS = 64  # of what has no bounds of its own


class Histogram(EverySteps):
    """Every `every_steps` optimizer steps, and at the last one, a row of {low, high, counts} over all ranks: in stage 2
    `histogram/timestep` and `histogram/latent` of the step's last micro-batch; in stage 1 `histogram/posterior_mean`
    and `histogram/posterior_log_variance` of held-out pictures.

    The first two are functions of the samples' numbers, so they are made again here from the batch; training steps do
    nothing. What has no bounds of its own is counted as far as the power of two that holds it all.
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
            shown = pl_module.histograms(self._batch)
            if not shown:
                return
            bins = {name: BINS.get(name) or _bins(trainer, values) for name, values in shown.items()}
            counted = torch.cat([counts(values, *bins[name]) for name, values in shown.items()])
            if trainer.world_size > 1:
                counted = trainer.strategy.reduce(counted, reduce_op="sum")
            each = counted.split([num for _, _, num in bins.values()])
            row = {"stage": pl_module.context.stage, "step": trainer.global_step, "images": pl_module.images_seen}
            for (name, (low, high, _)), told in zip(bins.items(), each):
                row[f"histogram/{name}"] = {"low": low, "high": high, "counts": told.tolist()}
        if trainer.is_global_zero:
            pl_module.context.tracker.log(row)


def _bins(trainer: Trainer, values: Tensor) -> tuple[float, float, int]:
    finite = values.detach().float().nan_to_num(0.0, 0.0, 0.0)  # what is not is the guard's, a step later
    extent = finite.abs().max() if values.numel() else torch.zeros((), device=values.device)
    if trainer.world_size > 1:
        extent = trainer.strategy.reduce(extent, reduce_op="max")
    reach = 2.0 ** math.ceil(math.log2(max(float(extent), 2.0**-20)))
    return -reach, reach, NUM_BINS


def counts(values: Tensor, low: float, high: float, num_bins: int) -> Tensor:
    """How many lie in each of equal bins, (num_bins,) int64 on their device; what lies outside is in the outer ones."""
    places = ((values.detach().float().flatten() - low) * (num_bins / (high - low))).floor().long()
    places = places.clamp(0, num_bins - 1)
    return torch.zeros(num_bins, dtype=torch.int64, device=values.device).scatter_add_(
        0, places, torch.ones_like(places)
    )
