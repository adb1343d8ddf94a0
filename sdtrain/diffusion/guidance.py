"""Guidance at sampling time."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from sdtrain.contracts import Conditioning
from sdtrain.errors import ConfigError


def stack(first: Conditioning, second: Conditioning) -> Conditioning:
    """Two conditionings of B as one of 2B. Both carry the same keys."""
    return {key: torch.cat((first[key], second[key])) for key in first}  # type: ignore[return-value,literal-required]


def rescaled(guided: Tensor, conditional: Tensor, share: float) -> Tensor:
    """Moves the standard deviation of each guided sample back to that of the conditional one, by a share of the way
    (Lin et al. 2023, section 3.4).
    """
    wanted, found = (x.flatten(1).std(dim=1).view(-1, *([1] * (x.dim() - 1))) for x in (conditional, guided))
    return guided * (share * wanted / found + (1 - share))


@dataclass(frozen=True)
class ClassifierFree:
    """`denoise(x_t, t) -> x0` that moves from the null prediction past the conditional one (Ho and Salimans 2021,
    equation 6).

    Args:
        scale: 1 is the conditional prediction alone, which costs one evaluation instead of two.
        rescale: the share of `rescaled`, on x0 and so the same for every prediction; the paper takes 0.7.
        interval: t outside of it is sampled without guidance (Kynkaanniemi et al. 2024).

    Raises:
        ConfigError: for an interval that is none within [0, 1], or a rescale that is no share.
    """

    scale: float = 1.0
    rescale: float = 0.0
    interval: Sequence[float] = (0.0, 1.0)

    def __post_init__(self) -> None:
        if len(self.interval) != 2 or not 0.0 <= self.interval[0] <= self.interval[1] <= 1.0:
            raise ConfigError(f"sampler.guidance.interval={list(self.interval)} must be two times that rise in [0, 1]")
        if not 0.0 <= self.rescale <= 1.0:
            raise ConfigError(f"sampler.guidance.rescale={self.rescale} must be a share, 0 to 1")

    def __call__(
        self, x0_of: Callable[[Tensor, float, Conditioning], Tensor], cond: Conditioning, null: Conditioning
    ) -> Callable[[Tensor, float], Tensor]:
        """x0_of: the network's x0 for (x_t, t, conditioning); channels beyond those of x_t, which say the variance,
        are the conditional ones as they are.
        """
        both = stack(cond, null)

        def denoise(x: Tensor, t: float) -> Tensor:
            if self.scale == 1.0 or not self.interval[0] <= t <= self.interval[1]:
                return x0_of(x, t, cond)
            conditional, unconditional = x0_of(torch.cat((x, x)), t, both).chunk(2)
            num_channels = x.shape[1]
            told, null_x0 = conditional[:, :num_channels], unconditional[:, :num_channels]
            guided = null_x0 + self.scale * (told - null_x0)
            if self.rescale:
                guided = rescaled(guided, told, self.rescale)
            beside = conditional[:, num_channels:]
            return torch.cat((guided, beside), dim=1) if beside.shape[1] else guided

        return denoise


UNGUIDED = ClassifierFree()
