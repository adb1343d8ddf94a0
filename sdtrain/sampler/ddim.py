"""DDIM (Song et al. 2021a), and with eta = 1 the ancestral Euler sampler."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from math import sqrt

from torch import Tensor

from sdtrain.contracts import NoisePath
from sdtrain.diffusion.guidance import UNGUIDED, ClassifierFree
from sdtrain.errors import ConfigError
from sdtrain.ops.random import Draw
from sdtrain.sampler.spacing import Spacing, check, levels, start


class DDIM:
    """x_s = alpha_s x0 + sqrt(sigma_s^2 - w^2) noise + w z (equation 12).

    With eta = 1 and w / alpha as `sigma_up` it is the ancestral Euler step of k-diffusion, to the letter.

    Args:
        num_steps: evaluations of the denoiser.
        eta: 0 is deterministic, 1 as random as DDPM; w = eta sigma_s sqrt(1 - (alpha_t sigma_s / (alpha_s
            sigma_t))^2), which is equation 16 where alpha^2 + sigma^2 = 1.
        guidance: how the denoiser is asked.
        shift, spacing: the times, see `spacing.py`.
    """

    order = 1

    def __init__(
        self,
        num_steps: int = 50,
        eta: float = 0.0,
        guidance: ClassifierFree = UNGUIDED,
        shift: float = 1.0,
        spacing: Spacing = "uniform",
    ) -> None:
        check(num_steps, spacing, shift)
        if not 0 <= eta <= 1:
            raise ConfigError(f"sampler.eta={eta} must lie between 0 and 1")
        self.num_steps, self.eta, self.guidance = num_steps, eta, guidance
        self.shift, self.spacing = shift, spacing

    def __call__(
        self, denoise: Callable[[Tensor, float], Tensor], noise: Tensor, path: NoisePath, draw: Draw | None = None
    ) -> Tensor:
        """noise (B, C, h, w) -> x0.

        Raises:
            ValueError: for eta > 0 without a draw.
        """
        if self.eta > 0 and draw is None:
            raise ValueError("DDIM with eta > 0 needs a draw for the noise of its steps")
        line = levels(path, self.num_steps, self.spacing, self.shift)
        x = start(noise, line[0])
        for i, (at, to) in enumerate(pairwise(line)):
            x0 = denoise(x, at.t)
            if to.sigma == 0:
                return x0
            share = self.eta * sqrt(1 - (at.alpha * to.sigma / (to.alpha * at.sigma)) ** 2)  # w / sigma_s
            x = to.alpha * x0 + to.sigma * sqrt(1 - share**2) * (x - at.alpha * x0) / at.sigma
            if self.eta > 0:
                x = x + to.sigma * share * draw.normal(f"ddim.{i}", x.shape[1:])
        return x
