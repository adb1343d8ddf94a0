"""Densities of the training time t on [0, 1], drawn from the counter-based generator: density(draw, path) -> t."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from sdtrain.contracts import NoisePath
from sdtrain.errors import ConfigError

if TYPE_CHECKING:
    from sdtrain.ops.random import Draw

_GOLDEN = 0x9E3779B9  # 2^32 / golden ratio, the step whose multiples spread most evenly modulo 2^32


@dataclass(frozen=True)
class Uniform:
    """Uniform; `num_steps` draws the steps of a discrete schedule, t = i / (num_steps - 1)."""

    num_steps: int | None = None

    def __post_init__(self) -> None:
        if self.num_steps is not None and self.num_steps < 2:
            raise ConfigError(f"timestep.num_steps={self.num_steps} must be at least 2")

    def __call__(self, draw: Draw, path: NoisePath) -> Tensor:  # noqa: ARG002 all densities are called so
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

    def __post_init__(self) -> None:
        if not self.shift > 0:
            raise ConfigError(f"timestep.shift={self.shift} must be above 0")

    def __call__(self, draw: Draw, path: NoisePath) -> Tensor:  # noqa: ARG002
        """(B,) float32."""
        t = torch.sigmoid(self.mean + self.std * draw.normal("timestep"))
        return self.shift * t / (1 + (self.shift - 1) * t)


@dataclass(frozen=True)
class LogNormal:
    """ln(sigma / alpha) is normal, on any path; what falls beyond the path's ends is drawn at them (Karras et al. 2022,
    table 1: mean -1.2, std 1.2 where the data's standard deviation is 0.5).

    Args:
        mean, std: of ln(sigma / alpha).
    """

    mean: float = -0.5
    std: float = 1.2

    def __call__(self, draw: Draw, path: NoisePath) -> Tensor:
        """(B,) float32."""
        return path.time_of(torch.exp(self.mean + self.std * draw.normal("timestep")))


@dataclass(frozen=True)
class LowDiscrepancy:
    """Another density at evenly spread quantiles: that of the n-th sample of a run is the fractional part of
    offset(seed) + n / golden ratio (the additive recurrence of Weyl 1916), instead of an independent one.

    So any n samples that follow each other, a rank's micro-batch, the batch of all ranks, several steps, have times
    whose largest gap is below 1.9 / n in quantiles and whose discrepancy is of order log(n) / n, where independent ones
    have sqrt(n) / n. A sample's place in the run's order is the same at any world size, before and after a resume.
    Outside of a run, as for the validation set, sample id and epoch stand in for the place.

    Args:
        density: what is drawn from.
    """

    density: Callable[[Draw, NoisePath], Tensor]

    def __call__(self, draw: Draw, path: NoisePath) -> Tensor:
        """(B,) float32."""
        return self.density(_EvenDraw(draw), path)


@dataclass(frozen=True)
class _EvenDraw:
    """What a density asks of a draw, one number a sample, from the recurrence."""

    draw: Draw

    def uniform(self, purpose: str) -> Tensor:
        digest = hashlib.blake2b(f"{self.draw.seed}/{purpose}".encode(), digest_size=4).digest()
        number = self.draw.sample_id + self.draw.epoch if self.draw.place is None else self.draw.place
        turned = number * _GOLDEN + int.from_bytes(digest, "little")
        return (((turned & 0xFFFFFFFF) >> 9).float() + 0.5) * 2.0**-23  # as Draw.uniform: on the open interval

    def normal(self, purpose: str) -> Tensor:
        return math.sqrt(2) * torch.erfinv(2 * self.uniform(purpose) - 1)
