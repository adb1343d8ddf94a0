"""What a network predicts, and every conversion between predictions; the only home of either.

With x_t = a x0 + s n (a, s and their derivatives from the path):
    epsilon   n                              (Ho et al. 2020)
    x0        x0
    v         (a n - s x0) / |(a, s)|        (Salimans and Ho 2022, appendix D, of x_t scaled to unit variance)
    velocity  da x0 + ds n, which is dx_t/dt (Lipman et al. 2022)
Each is linear in (x0, n), so each inverts by a two-by-two solve; where a prediction does not determine x0 on a whole
path (epsilon where alpha is 0), `check` refuses the two together.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from sdtrain.contracts import NoisePath, PathPoint
from sdtrain.errors import ConfigError

Prediction = Literal["epsilon", "x0", "v", "velocity"]
KINDS: tuple[Prediction, ...] = ("epsilon", "x0", "v", "velocity")


def spread(value: Tensor, like: Tensor) -> Tensor:
    """(B,) or () -> a shape that broadcasts against (B, ...)."""
    return value.reshape(-1, *([1] * (like.dim() - 1)))


def check(kind: str, path: NoisePath) -> None:
    """Refuses a prediction that does not exist, or does not determine x0 at the ends of a path.

    Raises:
        ConfigError: naming what does.
    """
    if kind not in KINDS:
        raise ConfigError(f"objective.prediction is one of {', '.join(KINDS)}, not {kind!r}")
    ends = path(torch.tensor([0.0, 1.0]))
    determined = [other for other in KINDS if bool((determinant(other, ends) != 0).all())]
    if kind not in determined:
        raise ConfigError(
            f"objective.prediction={kind} does not determine x0 at the end of this path, where alpha is 0 and x_t is"
            f" noise alone; write objective.prediction={' or '.join(determined)}, or a path whose alpha stays above 0"
        )


def coefficients(kind: Prediction, at: PathPoint) -> tuple[Tensor, Tensor]:
    """(c, d) of prediction = c x0 + d noise."""
    if kind == "v":
        size = torch.hypot(at.alpha, at.sigma)
        return -at.sigma / size, at.alpha / size
    if kind == "velocity":
        return at.d_alpha, at.d_sigma
    zero, one = torch.zeros_like(at.alpha), torch.ones_like(at.alpha)
    return (zero, one) if kind == "epsilon" else (one, zero)


def determinant(kind: Prediction, at: PathPoint) -> Tensor:
    """Of the rows (alpha, sigma) and (c, d): (x_t, prediction) determine (x0, noise) where it is not 0.

    x0 needs no more than the prediction x0 itself, which is then its own determinant.
    """
    if kind == "x0":
        return torch.ones_like(at.alpha)
    c, d = coefficients(kind, at)
    return at.alpha * d - at.sigma * c


def target(kind: Prediction, x0: Tensor, noise: Tensor, at: PathPoint) -> Tensor:
    """What a perfect network would say; x0 and noise (B, ...), `at` already spread."""
    if kind == "epsilon":
        return noise
    if kind == "x0":
        return x0
    c, d = coefficients(kind, at)
    return c * x0 + d * noise


def to_x0(kind: Prediction, prediction: Tensor, x_t: Tensor, at: PathPoint) -> Tensor:
    """The x0 that a prediction at x_t means, on a path that `check` lets it have."""
    if kind == "x0":
        return prediction
    _, d = coefficients(kind, at)
    return (d * x_t - at.sigma * prediction) / determinant(kind, at)


def to_noise(x0: Tensor, x_t: Tensor, at: PathPoint) -> Tensor:
    """The noise that an x0 at x_t means.

    Raises:
        ValueError: where sigma is 0, since x_t is then the data and says nothing of the noise.
    """
    if bool((at.sigma == 0).any()):
        raise ValueError("x0 does not determine epsilon where sigma is 0: x_t is the data there")
    return (x_t - at.alpha * x0) / at.sigma


def x0_error_weight(kind: Prediction, at: PathPoint) -> Tensor:
    """w of |target error|^2 = w |x0 error|^2 at a given x_t, where sigma is not 0."""
    if kind == "x0":
        return torch.ones_like(at.alpha)
    return (determinant(kind, at) / at.sigma) ** 2
