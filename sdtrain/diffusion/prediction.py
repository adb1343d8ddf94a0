"""What a network predicts, and every conversion between predictions; the only home of either.

With x_t = a x0 + s n (a, s and their derivatives from the path):
    epsilon   n                              (Ho et al. 2020)
    x0        x0
    v         a n - s x0                     (Salimans and Ho 2022, appendix D)
    velocity  da x0 + ds n, which is dx_t/dt (Lipman et al. 2022)
Each is linear in (x0, n), so each inverts by a two-by-two solve; a prediction that does not determine x0 at some t
(epsilon where
alpha is 0) is refused by name.
"""

from __future__ import annotations

from typing import Literal

from torch import Tensor

from sdtrain.contracts import PathPoint
from sdtrain.errors import ConfigError

Prediction = Literal["epsilon", "x0", "v", "velocity"]
KINDS: tuple[Prediction, ...] = ("epsilon", "x0", "v", "velocity")


def spread(value: Tensor, like: Tensor) -> Tensor:
    """(B,) or () -> a shape that broadcasts against (B, ...)."""
    return value.reshape(-1, *([1] * (like.dim() - 1)))


def check(kind: str) -> None:
    """Refuses a prediction that does not exist.

    Raises:
        ConfigError: naming those that do.
    """
    if kind not in KINDS:
        raise ConfigError(f"objective.prediction is one of {', '.join(KINDS)}, not {kind!r}")


def coefficients(kind: Prediction, at: PathPoint) -> tuple[Tensor | float, Tensor | float]:
    """(c, d) of prediction = c x0 + d noise."""
    return {
        "epsilon": (0.0, 1.0),
        "x0": (1.0, 0.0),
        "v": (-at.sigma, at.alpha),
        "velocity": (at.d_alpha, at.d_sigma),
    }[kind]


def target(kind: Prediction, x0: Tensor, noise: Tensor, at: PathPoint) -> Tensor:
    """What a perfect network would say; x0 and noise (B, ...), `at` already spread."""
    c, d = coefficients(kind, at)
    return c * x0 + d * noise


def to_x0(kind: Prediction, prediction: Tensor, x_t: Tensor, at: PathPoint) -> Tensor:
    """The x0 that a prediction at x_t means.

    Raises:
        ValueError: where the prediction does not determine x0 (epsilon at alpha = 0).
    """
    if kind == "x0":
        return prediction
    c, d = coefficients(kind, at)
    determinant = at.alpha * d - at.sigma * c  # of [[alpha, sigma], [c, d]]
    if bool((determinant == 0).any()):
        raise ValueError(
            f"a prediction of {kind} does not determine x0 where alpha is 0; predict v, x0 or velocity there"
        )
    return (d * x_t - at.sigma * prediction) / determinant


def to_noise(x0: Tensor, x_t: Tensor, at: PathPoint) -> Tensor:
    """The noise that an x0 at x_t means.

    Raises:
        ValueError: where sigma is 0, since x_t is then the data and says nothing of the noise.
    """
    if bool((at.sigma == 0).any()):
        raise ValueError("noise is not determined where sigma is 0")
    return (x_t - at.alpha * x0) / at.sigma


def x0_error_weight(kind: Prediction, at: PathPoint) -> Tensor:
    """w of |target error|^2 = w |x0 error|^2 at a given x_t."""
    c, d = coefficients(kind, at)
    return (c - d * at.alpha / at.sigma) ** 2
