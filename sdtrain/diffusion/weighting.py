"""Weights of the loss over t, relative to the squared error of the network's own prediction: weighting(kind, at) -> w.

All but `Unit` are defined on the error of x0 and converted by `prediction.x0_error_weight`, so the same weighting means
the same loss whatever the network predicts.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
from torch import Tensor

from sdtrain.contracts import PathPoint
from sdtrain.diffusion.prediction import Prediction, x0_error_weight
from sdtrain.errors import ConfigError

# Of alpha and sigma inside of a weight: its limits are reached in float32, without a quotient of zeros.
_LEAST = 1e-6


@dataclass(frozen=True)
class Unit:
    """Every t counts alike, on the network's own prediction."""

    def __call__(self, kind: Prediction, at: PathPoint) -> Tensor:  # noqa: ARG002 all weightings are called so
        """(B,) -> (B,)."""
        return torch.ones_like(at.alpha)


class OnX0(ABC):
    """A weight of the squared error of x0, said in that of the network's own prediction."""

    @abstractmethod
    def on_x0(self, at: PathPoint) -> Tensor:
        """(B,) -> (B,): the weight of |x0 error|^2; alpha and sigma are above 0."""

    def __call__(self, kind: Prediction, at: PathPoint) -> Tensor:
        """(B,) -> (B,), finite at both ends of every path."""
        inside = at._replace(alpha=at.alpha.clamp(min=_LEAST), sigma=at.sigma.clamp(min=_LEAST))
        return self.on_x0(inside) / x0_error_weight(kind, inside)


def _require_positive(**values: float) -> None:
    """A weight below 0 would have the network learn the opposite."""
    for name, value in values.items():
        if not value > 0:
            raise ConfigError(f"weighting.{name}={value} must be above 0")


def snr(at: PathPoint) -> Tensor:
    """Signal-to-noise ratio alpha^2 / sigma^2."""
    return (at.alpha / at.sigma) ** 2


@dataclass(frozen=True)
class MinSNR(OnX0):
    """min(SNR, gamma) (Hang et al. 2023, equation 8)."""

    gamma: float = 5.0

    def __post_init__(self) -> None:
        _require_positive(gamma=self.gamma)

    def on_x0(self, at: PathPoint) -> Tensor:
        """(B,) -> (B,)."""
        return snr(at).clamp(max=self.gamma)


@dataclass(frozen=True)
class SoftMinSNR(OnX0):
    """SNR gamma / (SNR + gamma), which bends where min-SNR has its corner (Crowson et al. 2024)."""

    gamma: float = 5.0

    def __post_init__(self) -> None:
        _require_positive(gamma=self.gamma)

    def on_x0(self, at: PathPoint) -> Tensor:
        """(B,) -> (B,)."""
        return self.gamma * snr(at) / (snr(at) + self.gamma)


@dataclass(frozen=True)
class P2(OnX0):
    """1 / (k + SNR)^gamma on the error of epsilon (Choi et al. 2022, section 3)."""

    k: float = 1.0
    gamma: float = 1.0

    def __post_init__(self) -> None:
        _require_positive(k=self.k)

    def on_x0(self, at: PathPoint) -> Tensor:
        """(B,) -> (B,)."""
        return snr(at) / (self.k + snr(at)) ** self.gamma


@dataclass(frozen=True)
class EDM(OnX0):
    """(sigma^2 + sigma_data^2) / (sigma sigma_data)^2 with sigma_data 1, which is SNR + 1: v counts alike at every t
    (Karras et al. 2022, table 1).
    """

    def on_x0(self, at: PathPoint) -> Tensor:
        """(B,) -> (B,)."""
        return snr(at) + 1


@dataclass(frozen=True)
class Sigmoid(OnX0):
    """sigmoid(bias - log SNR) of the evidence bound's own weight, -d log SNR / dt on the error of epsilon (Kingma and
    Gao 2023): for uniform t the same expected loss on every path.

    Args:
        bias: the log SNR at which half is counted; lower for larger pictures (Hoogeboom et al. 2024).
    """

    bias: float = 0.0

    def on_x0(self, at: PathPoint) -> Tensor:
        """(B,) -> (B,)."""
        share = math.exp(self.bias) / (math.exp(self.bias) + snr(at))
        speed = 2 * (at.alpha * at.d_sigma - at.sigma * at.d_alpha) / (at.alpha * at.sigma)  # -d log SNR / dt
        return snr(at) * share * speed
