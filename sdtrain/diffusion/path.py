"""Noise paths: x_t = alpha(t) x0 + sigma(t) noise on t in [0, 1], data at 0, noise at 1, with their time derivatives.

A path also says what a network is told of time (`network_time`), how its input is scaled (`input_scale`), and at which
t a ratio of noise to data is reached (`time_of`), so that the schedule that trains is the schedule that samples. Values
come on the device and in the type of t; nothing is float64 there unless t is.
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

    def __post_init__(self) -> None:
        if not self.time_scale > 0:
            raise ConfigError(f"time_scale={self.time_scale} must be above 0: the network is told of time by it")

    def __call__(self, t: Tensor) -> PathPoint:
        one = torch.ones_like(t)
        return PathPoint(1.0 - t, t, -one, one)

    def network_time(self, t: Tensor) -> Tensor:
        """(B,) -> (B,)."""
        return t * self.time_scale

    def input_scale(self, t: Tensor) -> Tensor:
        """(B,) -> (B,): x_t has at most unit variance as it is."""
        return torch.ones_like(t)

    def time_of(self, ratio: Tensor) -> Tensor:
        """The t at which sigma / alpha is `ratio`."""
        return 1.0 / (1.0 + 1.0 / ratio)


@dataclass(frozen=True)
class VariancePreserving:
    """alpha^2 + sigma^2 = 1 over 1000 discrete steps (Ho et al. 2020), and between them along the circle's arc.

    t = i / (num_steps - 1) is exactly step i, and `network_time` is then i. The arc (alpha = cos, sigma = sin of an
    angle that is linear in t from step to step) keeps values and derivatives finite where alpha is 0; at a step the
    derivatives are those of the arc after it, at the last step of the arc before.

    Args:
        schedule: "scaled_linear" (Stable Diffusion), "linear" (DDPM) in beta, or "cosine" in alpha-bar (Nichol and
            Dhariwal 2021, equation 17).
        beta_start, beta_end: of the first and last step, for the two linear schedules.
        zero_terminal_snr: shift and scale alpha so that it is 0 at the last step (Lin et al. 2023, algorithm 1).
    """

    schedule: Literal["scaled_linear", "linear", "cosine"] = "scaled_linear"
    num_steps: int = 1000
    beta_start: float = 0.00085
    beta_end: float = 0.012
    zero_terminal_snr: bool = False

    def __post_init__(self) -> None:
        if self.schedule not in ("scaled_linear", "linear", "cosine"):
            raise ConfigError(f"schedule is scaled_linear, linear or cosine, not {self.schedule!r}")
        if self.num_steps < 2:
            raise ConfigError(f"num_steps={self.num_steps} must be at least 2")
        if not (0 < self.beta_start < 1 and 0 < self.beta_end < 1):
            raise ConfigError(f"beta_start={self.beta_start} and beta_end={self.beta_end} must lie between 0 and 1")
        object.__setattr__(self, "_table", self._steps())
        object.__setattr__(self, "_copies", {})

    def _steps(self) -> Tensor:
        """alpha, sigma, their angle, and the arc to the next step; float64 (4, num_steps) on the CPU."""
        if self.schedule == "cosine":
            steps = torch.arange(self.num_steps + 1, dtype=torch.float64) / self.num_steps
            bar = torch.cos((steps + 0.008) / 1.008 * math.pi / 2) ** 2
            betas = (1 - bar[1:] / bar[:-1]).clamp(max=0.999)
        else:
            power = 0.5 if self.schedule == "scaled_linear" else 1.0
            start, end = self.beta_start**power, self.beta_end**power
            betas = torch.linspace(start, end, self.num_steps, dtype=torch.float64) ** (1 / power)
        alpha = torch.cumprod(1 - betas, dim=0).sqrt()
        if self.zero_terminal_snr:
            alpha = (alpha - alpha[-1]) * (alpha[0] / (alpha[0] - alpha[-1]))
        sigma = (1 - alpha**2).sqrt()
        angle = torch.atan2(sigma, alpha)
        return torch.stack((alpha, sigma, angle, torch.cat((angle.diff(), angle[-1:] - angle[-2:-1]))))

    def _table_for(self, like: Tensor) -> Tensor:
        """The table in the type and on the device of `like`, copied there once."""
        kind = (like.device, like.dtype)
        if kind not in self._copies:
            self._copies[kind] = self._table.to(like.dtype).to(like.device)  # float64 does not exist on every device
        return self._copies[kind]

    def __call__(self, t: Tensor) -> PathPoint:
        alpha, sigma, _, arcs = self._table_for(t)
        position = self.network_time(t)
        low = position.detach().long().clamp(max=self.num_steps - 2)
        arc, part = arcs[low], position - low
        near, far = torch.sin((1 - part) * arc) / torch.sin(arc), torch.sin(part * arc) / torch.sin(arc)
        a, s = near * alpha[low] + far * alpha[low + 1], near * sigma[low] + far * sigma[low + 1]
        rate = arc * (self.num_steps - 1)  # d angle / dt
        return PathPoint(a, s, -s * rate, a * rate)

    def network_time(self, t: Tensor) -> Tensor:
        """(B,) -> (B,): the step's number, from 0; a time within a rounding of a step is that step."""
        position = t.clamp(0, 1) * (self.num_steps - 1)
        step = position.round()
        is_step = (position - step).abs() <= self.num_steps * torch.finfo(t.dtype).eps
        return torch.where(is_step, step, position)

    def input_scale(self, t: Tensor) -> Tensor:
        """(B,) -> (B,): x_t has unit variance as it is."""
        return torch.ones_like(t)

    def time_of(self, ratio: Tensor) -> Tensor:
        """The t at which sigma / alpha is `ratio`, or the end that is nearest."""
        _, _, angles, arcs = self._table_for(ratio)
        angle = torch.atan(ratio)
        low = torch.searchsorted(angles, angle.detach(), right=True).sub(1).clamp(0, self.num_steps - 2)
        return ((low + (angle - angles[low]) / arcs[low]) / (self.num_steps - 1)).clamp(0, 1)


@dataclass(frozen=True)
class EDM:
    """alpha = 1 and sigma from sigma_min to sigma_max, linear in its rho-th root (Karras et al. 2022, equation 5).

    Latents are whitened, so sigma_data is 1. With the prediction `v` this is the paper's preconditioning: x_t scaled to
    unit variance lies on a variance-preserving path, whose v is minus the paper's F (equation 7, table 1).

    Args:
        time_scale: the network is told ln(sigma) times this (c_noise in table 1).
    """

    sigma_min: float = 0.002
    sigma_max: float = 80.0
    rho: float = 7.0
    time_scale: float = 0.25

    def __post_init__(self) -> None:
        if not 0 < self.sigma_min < self.sigma_max:
            raise ConfigError(f"sigma_min={self.sigma_min} and sigma_max={self.sigma_max} must rise from above 0")
        if not (self.rho > 0 and self.time_scale > 0):
            raise ConfigError(f"rho={self.rho} and time_scale={self.time_scale} must be above 0")

    def _roots(self) -> tuple[float, float]:
        return self.sigma_min ** (1 / self.rho), self.sigma_max ** (1 / self.rho)

    def __call__(self, t: Tensor) -> PathPoint:
        low, high = self._roots()
        root = low + t * (high - low)
        slope = self.rho * (high - low) * root ** (self.rho - 1)
        return PathPoint(torch.ones_like(t), root**self.rho, torch.zeros_like(t), slope)

    def network_time(self, t: Tensor) -> Tensor:
        """(B,) -> (B,)."""
        low, high = self._roots()
        return torch.log(low + t * (high - low)) * (self.rho * self.time_scale)

    def input_scale(self, t: Tensor) -> Tensor:
        """(B,) -> (B,): c_in, which gives x_t unit variance (table 1)."""
        return torch.rsqrt(1 + self(t).sigma ** 2)

    def time_of(self, ratio: Tensor) -> Tensor:
        """The t at which sigma is `ratio`, or the end that is nearest."""
        low, high = self._roots()
        return ((ratio ** (1 / self.rho) - low) / (high - low)).clamp(0, 1)
