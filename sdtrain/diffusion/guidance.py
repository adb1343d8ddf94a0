"""Guidance at sampling time."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from sdtrain.contracts import Conditioning
from sdtrain.errors import ConfigError


def stack(*told: Conditioning) -> Conditioning:
    """Several conditionings of B as one, (B, ...) each -> (num B, ...). All carry the same keys."""
    return {key: torch.cat([one[key] for one in told]) for key in told[0]}  # type: ignore[return-value,literal-required]


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
        image_scale: of the picture to edit alone, where `scale` is then that of the text beside it (Brooks et al. 2023,
            equation 3), which costs three evaluations; null moves away from both at once.

    Raises:
        ConfigError: for an interval that is none within [0, 1], or a rescale that is no share; when called, for an
            image_scale where there is no such picture.
    """

    scale: float = 1.0
    rescale: float = 0.0
    interval: Sequence[float] = (0.0, 1.0)
    image_scale: float | None = None

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
        asked = (cond, null) if self.image_scale is None else (cond, null, _pictured(cond, null))
        stacked = stack(*asked)

        def denoise(x: Tensor, t: float) -> Tensor:
            is_plain = not cond or (self.scale == 1.0 and self.image_scale in (None, 1.0))
            if is_plain or not self.interval[0] <= t <= self.interval[1]:
                return x0_of(x, t, cond)
            num_channels = x.shape[1]
            found = x0_of(torch.cat([x] * len(asked)), t, stacked).chunk(len(asked))
            told, nothing, *pictured = (one[:, :num_channels] for one in found)
            without_text = pictured[0] if pictured else nothing
            guided = without_text + self.scale * (told - without_text)
            if pictured:
                guided = guided + (self.image_scale - 1) * (without_text - nothing)
            if self.rescale:
                guided = rescaled(guided, told, self.rescale)
            beside = found[0][:, num_channels:]
            return torch.cat((guided, beside), dim=1) if beside.shape[1] else guided

        return denoise


def _pictured(cond: Conditioning, null: Conditioning) -> Conditioning:
    """The null condition with the picture."""
    if "concat" not in cond or torch.equal(cond["concat"], null["concat"]):
        raise ConfigError(
            "sampler.guidance.image_scale needs a picture that training leaves out of some samples: conditioner=editing"
            " with a dropout above 0"
        )
    return {**null, "concat": cond["concat"]}


UNGUIDED = ClassifierFree()
