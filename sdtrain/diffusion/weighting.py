"""Weights of the loss over t. Each is relative to the squared error of the network's own prediction."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from sdtrain.contracts import PathPoint
from sdtrain.diffusion.prediction import Prediction, x0_error_weight


@dataclass(frozen=True)
class Unit:
    """Every t counts alike."""

    def __call__(self, kind: Prediction, at: PathPoint) -> Tensor:  # noqa: ARG002 all weightings are called so
        """(B,) -> (B,)."""
        return torch.ones_like(at.alpha)


@dataclass(frozen=True)
class MinSNR:
    """min(SNR, gamma) on the x0 error (Hang et al. 2023, equation 8), converted to the network's own prediction.

    Finite at SNR 0 for v, x0 and velocity; with epsilon the weight min(SNR, gamma) / SNR tends to 1 there.
    """

    gamma: float = 5.0

    def __call__(self, kind: Prediction, at: PathPoint) -> Tensor:
        """(B,) -> (B,)."""
        sigma = at.sigma.clamp(min=1e-4)
        snr = (at.alpha / sigma) ** 2
        weight = snr.clamp(max=self.gamma)
        return torch.where(
            snr < self.gamma if kind == "epsilon" else torch.zeros_like(snr, dtype=torch.bool),
            torch.ones_like(snr),
            weight / x0_error_weight(kind, at._replace(sigma=sigma)).clamp(min=1e-12),
        )
