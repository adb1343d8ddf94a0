"""Densities of the training time t on [0, 1], drawn from the counter-based generator."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from sdtrain.ops.random import Draw


@dataclass(frozen=True)
class Uniform:
    """Uniform; `num_steps` draws the steps of a discrete schedule, t = i / (num_steps - 1)."""

    num_steps: int | None = None

    def __call__(self, draw: Draw) -> Tensor:
        """(B,) float32."""
        u = draw.uniform("timestep")
        if self.num_steps is None:
            return u
        return (u * self.num_steps).floor().clamp(max=self.num_steps - 1) / (self.num_steps - 1)


@dataclass(frozen=True)
class LogitNormal:
    """sigmoid of a normal (Esser et al. 2024, equation 19), then the resolution shift t' = s t / (1 + (s - 1) t)
    (equation 23).

    Args:
        mean, std: of the normal.
        shift: 1 is none; sqrt(pixels ratio) in the paper.
    """

    mean: float = 0.0
    std: float = 1.0
    shift: float = 1.0

    def __call__(self, draw: Draw) -> Tensor:
        """(B,) float32."""
        t = torch.sigmoid(self.mean + self.std * draw.normal("timestep"))
        return self.shift * t / (1 + (self.shift - 1) * t)
