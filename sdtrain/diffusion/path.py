"""Noise paths: x_t = alpha(t) x0 + sigma(t) noise on t in [0, 1], data at 0, noise at 1, with their time derivatives.

A path also says how a network counts time (`network_time`), so that the schedule that trains is the schedule that
samples.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from sdtrain.contracts import PathPoint
from sdtrain.errors import ConfigError


@dataclass(frozen=True)
class RectifiedFlow:
    """Straight lines from data to noise: alpha = 1 - t, sigma = t (Liu et al. 2022; Lipman et al. 2022).

    Args:
        time_scale: the network is told t times this; 1000 as in SD3.
    """

    time_scale: float = 1000.0

    def __call__(self, t: Tensor) -> PathPoint:
        one = torch.ones_like(t)
        return PathPoint(1.0 - t, t, -one, one)

    def network_time(self, t: Tensor) -> Tensor:
        """(B,) -> (B,)."""
        return t * self.time_scale


@dataclass(frozen=True)
class VariancePreserving:
    """alpha^2 + sigma^2 = 1 over 1000 discrete steps (Ho et al. 2020), interpolated linearly in log-SNR between them.

    t = i / (num_steps - 1) is exactly step i, and `network_time` is then i.

    Args:
        schedule: "scaled_linear" (Stable Diffusion), "linear" (DDPM) in beta, or "cosine" in alpha-bar (Nichol and
            Dhariwal
            2021, equation 17).
        beta_start, beta_end: of the first and last step, for the two linear schedules.
    """

    schedule: Literal["scaled_linear", "linear", "cosine"] = "scaled_linear"
    num_steps: int = 1000
    beta_start: float = 0.00085
    beta_end: float = 0.012

    def __post_init__(self) -> None:
        if self.schedule not in ("scaled_linear", "linear", "cosine"):
            raise ConfigError(f"schedule is scaled_linear, linear or cosine, not {self.schedule!r}")
        object.__setattr__(self, "_half_log_snr", self._table())

    def _table(self) -> Tensor:
        """log(alpha / sigma) of every step, float64 (num_steps,)."""
        if self.schedule == "cosine":
            steps = torch.arange(self.num_steps + 1, dtype=torch.float64) / self.num_steps
            bar = torch.cos((steps + 0.008) / 1.008 * math.pi / 2) ** 2
            betas = (1 - bar[1:] / bar[:-1]).clamp(max=0.999)
        else:
            power = 0.5 if self.schedule == "scaled_linear" else 1.0
            start, end = self.beta_start**power, self.beta_end**power
            betas = torch.linspace(start, end, self.num_steps, dtype=torch.float64) ** (1 / power)
        alpha_bar = torch.cumprod(1 - betas, dim=0)
        return 0.5 * (torch.log(alpha_bar) - torch.log1p(-alpha_bar))

    def __call__(self, t: Tensor) -> PathPoint:
        table = self._half_log_snr.to(t.device)
        position = t.double().clamp(0, 1) * (self.num_steps - 1)
        low = position.floor().long().clamp(max=self.num_steps - 2)
        slope = table[low + 1] - table[low]
        half = table[low] + (position - low) * slope  # log(alpha / sigma)
        alpha, sigma = torch.sigmoid(2 * half).sqrt(), torch.sigmoid(-2 * half).sqrt()
        rate = slope * (self.num_steps - 1)  # d half / dt
        point = (alpha, sigma, alpha * sigma**2 * rate, -sigma * alpha**2 * rate)
        return PathPoint(*(v.to(t.dtype) for v in point))

    def network_time(self, t: Tensor) -> Tensor:
        """(B,) -> (B,): the step's number, from 0."""
        return t * (self.num_steps - 1)
