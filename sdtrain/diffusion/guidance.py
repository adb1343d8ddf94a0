"""Guidance at sampling time."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from sdtrain.contracts import Conditioning


def stack(first: Conditioning, second: Conditioning) -> Conditioning:
    """Two conditionings of B as one of 2B. Both carry the same keys."""
    return {key: torch.cat((first[key], second[key])) for key in first}  # type: ignore[return-value,literal-required]


def classifier_free(
    x0_of: Callable[[Tensor, float, Conditioning], Tensor],
    cond: Conditioning,
    null: Conditioning,
    scale: float,
    interval: tuple[float, float] = (0.0, 1.0),
) -> Callable[[Tensor, float], Tensor]:
    """`denoise(x_t, t) -> x0` that moves from the null prediction past the conditional one (Ho and Salimans 2021,
    equation 6).

    Args:
        x0_of: the network's x0 for (x_t, t, conditioning).
        scale: 1 is the conditional prediction alone, which costs one evaluation instead of two.
        interval: t outside of it is sampled without guidance (Kynkaanniemi et al. 2024).
    """
    both = stack(cond, null)

    def denoise(x: Tensor, t: float) -> Tensor:
        if scale == 1.0 or not interval[0] <= t <= interval[1]:
            return x0_of(x, t, cond)
        conditional, unconditional = x0_of(torch.cat((x, x)), t, both).chunk(2)
        return unconditional + scale * (conditional - unconditional)

    return denoise
