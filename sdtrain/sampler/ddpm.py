"""DDPM's ancestral sampling (Ho et al. 2020, algorithm 2), over any path and any number of its steps."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from math import sqrt
from typing import Literal, get_args

import torch
from torch import Tensor

from sdtrain.contracts import NoisePath
from sdtrain.diffusion.guidance import UNGUIDED, ClassifierFree
from sdtrain.diffusion.variance import ReverseStep, log_variance, reverse_step
from sdtrain.errors import ConfigError
from sdtrain.ops.random import Draw
from sdtrain.sampler.spacing import Level, Spacing, check, levels, start

Variance = Literal["fixed_small", "fixed_large", "learned"]


class DDPM:
    """x_s ~ N(mean of q(x_s | x_t, x0), variance) (equations 6 and 7); the last step adds no noise.

    Args:
        num_steps: evaluations of the denoiser.
        variance: `fixed_small`, `fixed_large`, or `learned`: the denoiser then returns (B, 2C, h, w), x0 and where
            between the two the log-variance lies (Nichol and Dhariwal 2021, equation 15).
        guidance: how the denoiser is asked.
        shift, spacing: the times, see `spacing.py`.
    """

    order = 1

    def __init__(
        self,
        num_steps: int = 250,
        variance: Variance = "fixed_small",
        guidance: ClassifierFree = UNGUIDED,
        shift: float = 1.0,
        spacing: Spacing = "uniform",
    ) -> None:
        check(num_steps, spacing, shift)
        if variance not in get_args(Variance):
            raise ConfigError(f"sampler.variance={variance} is none of {', '.join(get_args(Variance))}")
        self.num_steps, self.variance, self.guidance = num_steps, variance, guidance
        self.shift, self.spacing = shift, spacing
        self.learned_variance = variance == "learned"  # so that who calls has the denoiser say it

    def __call__(
        self, denoise: Callable[[Tensor, float], Tensor], noise: Tensor, path: NoisePath, draw: Draw | None = None
    ) -> Tensor:
        """noise (B, C, h, w) -> x0.

        Raises:
            ValueError: without a draw.
        """
        if draw is None:
            raise ValueError("DDPM needs a draw for the noise of its steps")
        line = levels(path, self.num_steps, self.spacing, self.shift)
        x = start(noise, line[0])
        for i, (at, to) in enumerate(pairwise(line)):
            output = denoise(x, at.t)
            x0 = output[:, : noise.shape[1]]
            if to.sigma == 0:
                return x0
            step = reverse_step(at, to)
            if self.learned_variance:
                within = ReverseStep(*map(torch.tensor, step))
                deviation = (0.5 * log_variance(output[:, noise.shape[1] :], within)).exp()
            else:
                deviation = sqrt(self._fixed(step, at, to))
            mean = at.alpha / to.alpha * (to.sigma / at.sigma) ** 2 * x + step.of_x0 * x0
            x = mean + deviation * draw.normal(f"ddpm.{i}", x.shape[1:])
        return x

    def _fixed(self, step: ReverseStep, at: Level, to: Level) -> float:
        """The variance of the way back where the data is one point, and where it has variance 1, which on
        variance-preserving paths is beta (Ho et al. 2020, section 3.2).
        """
        if self.variance == "fixed_small":
            return step.beta_tilde
        return step.beta * (to.alpha**2 + to.sigma**2) / (at.alpha**2 + at.sigma**2)
