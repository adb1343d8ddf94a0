"""How much each step counts in an average of weights, and how averages that were not kept are made from those that
were.

The power-function profile and the reconstruction are those of Karras et al., "Analyzing and Improving the Training
Dynamics of Diffusion Models" (2024), section 3 and appendix C. Time is counted in updates from the start of training.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import NamedTuple

import numpy as np

from sdtrain.errors import ConfigError

MAX_LENGTH = 12**-0.5  # of exponent 0, where all steps count alike


class Exponential(NamedTuple):
    """The usual average, whose decay warms up so that early ones forget the initial weights."""

    decay: float
    length: None = None

    def kept(self, update: int) -> float:
        """The share of the average that an update, counted from 1, leaves in place.

        The warm-up is that of TensorFlow's ExponentialMovingAverage.
        """
        return min(self.decay, update / (9 + update))


class Power(NamedTuple):
    """Weights at time t count as t^exponent; `length` is the profile's standard deviation as a share of training.

    It forgets the beginning at any time, and grows with the training so far.
    """

    length: float

    @property
    def exponent(self) -> float:
        """gamma of length = sqrt(gamma + 1) / ((gamma + 2) sqrt(gamma + 3)) (equation 123)."""
        inverse = self.length**-2
        return float(np.roots([1, 7, 16 - inverse, 12 - inverse]).real.max())

    def kept(self, update: int) -> float:
        """beta of section 3.1: nothing of what was before the first update."""
        return (1 - 1 / update) ** (exponent_of(self.length) + 1)


@lru_cache
def exponent_of(length: float) -> float:
    """gamma, of length = sqrt(gamma + 1) / ((gamma + 2) sqrt(gamma + 3)) (equation 123).

    Raises:
        ConfigError: for a length that no profile has.
    """
    if not 0 < length <= MAX_LENGTH:
        raise ConfigError(
            f"ema: a length is a standard deviation as a share of training: above 0, at most {MAX_LENGTH:.3f}; "
            f"{length} is not"
        )
    inverse = length**-2
    return float(np.roots([1, 7, 16 - inverse, 12 - inverse]).real.max())


class Snapshot(NamedTuple):
    """A power-function average as it stood after so many updates."""

    num_updates: int
    length: float


def mix(stored: Sequence[Snapshot], wanted: Snapshot) -> tuple[np.ndarray, float]:
    """The factors whose sum of stored averages comes closest to the wanted one, and how much of it they miss.

    The least squares of appendix C, over profiles as functions of continuous time, among factors that add up to 1: so
    weights that stand still come out as they are, also where few averages are stored. What is missed is the norm of the
    difference of the profiles as a share of the wanted one's.
    """
    products = _products([*stored, wanted])
    sizes = np.sqrt(products.diagonal())
    products /= np.outer(sizes, sizes)  # of profiles of norm 1, so that early ones do not outweigh late ones
    inner, target, ones = products[:-1, :-1], products[:-1, -1], sizes[-1] / sizes[:-1]
    system = np.block([[inner, ones[:, None]], [ones, np.zeros(1)]])  # the last unknown is the multiplier of the sum
    factors = np.linalg.lstsq(system, np.append(target, 1.0), rcond=1e-12)[0][:-1]
    missed = 1 - 2 * factors @ target + factors @ inner @ factors
    return factors * ones, float(np.sqrt(max(missed, 0.0)))


def _products(snapshots: Sequence[Snapshot]) -> np.ndarray:
    """Integrals over time of every product of two profiles, (gamma + 1) t^gamma / T^(gamma + 1) up to T each."""
    ends = np.array([[snapshot.num_updates] for snapshot in snapshots], float)
    powers = np.array([[exponent_of(snapshot.length)] for snapshot in snapshots])
    earlier, later = np.minimum(ends, ends.T), np.maximum(ends, ends.T)
    later_power = np.where(ends < ends.T, powers.T, powers)
    return (powers + 1) * (powers.T + 1) / (powers + powers.T + 1) * (earlier / later) ** later_power / later
