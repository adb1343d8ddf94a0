"""The variance of a reverse step, between its two bounds, and the loss that teaches a network where it lies (Nichol and
Dhariwal 2021).

A network of twice the channels says a fraction f beside its prediction; the step's variance is then
exp(f log beta + (1 - f) log beta-tilde) (equation 15), for steps of whatever length.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from sdtrain.contracts import PathPoint
from sdtrain.diffusion.prediction import spread

if TYPE_CHECKING:
    from sdtrain.diffusion.path import VariancePreserving


class ReverseStep(NamedTuple):
    """q(x_s | x_t, x0) of a step from t back to s: its variance beta-tilde, the upper bound beta, and the factor of x0
    in its mean (Ho et al. 2020, equation 7).
    """

    beta: Tensor
    beta_tilde: Tensor
    of_x0: Tensor


def reverse_step(at: PathPoint, before: PathPoint) -> ReverseStep:
    """The step from `at` to `before`, which is nearer to the data."""
    beta = at.sigma**2 - (at.alpha / before.alpha * before.sigma) ** 2
    return ReverseStep(beta, beta * (before.sigma / at.sigma) ** 2, before.alpha * beta / at.sigma**2)


def log_variance(fraction: Tensor, step: ReverseStep) -> Tensor:
    """Equation 15; what the step holds broadcasts against `fraction` (B, C, h, w)."""
    return step.beta_tilde.log() + fraction * (step.beta / step.beta_tilde).log()


def fraction_of(output: Tensor) -> Tensor:
    """A network's second half, -1 and 1 at the bounds, as a fraction; like the paper's it is not clamped."""
    return (output + 1) / 2


def training_step(path: VariancePreserving, t: Tensor) -> ReverseStep:
    """The step of the training schedule that ends at t (B,) -> (B,) each.

    The first step ends at the data, where beta-tilde is 0; it takes that of the second, as the paper's code does.
    """
    length = 1 / (path.num_steps - 1)
    is_first, late = path.network_time(t) < 1, t.clamp(min=length)
    step = reverse_step(path(late), path(late - length))
    beta, of_x0 = torch.where(is_first, path(t).sigma ** 2, step.beta), torch.where(is_first, 1.0, step.of_x0)
    return ReverseStep(beta, step.beta_tilde, of_x0)


def variational_bound(path: VariancePreserving, t: Tensor, x0: Tensor, predicted: Tensor, fraction: Tensor) -> Tensor:
    """(B,) bits a dimension of the whole bound, from the one step at t: num_steps KL(q(x_s | x_t, x0) || p(x_s | x_t)).

    Latents are continuous, so the last step back to the data is a Gaussian like the others. The mean is p's own, so
    `predicted` x0 is detached by whoever trains the variance alone (equation 16).
    """
    step = ReverseStep(*(spread(value, x0) for value in training_step(path, t)))
    wider = fraction * (step.beta / step.beta_tilde).log()  # p's log-variance less q's
    moved = (step.of_x0 * (x0 - predicted)) ** 2 / step.beta_tilde
    divergence = 0.5 * (wider + torch.expm1(-wider) + moved * torch.exp(-wider))
    return divergence.flatten(1).mean(dim=1) * (path.num_steps / math.log(2))
