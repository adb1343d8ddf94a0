"""Euler and Heun on the probability-flow ODE."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from sdtrain.contracts import NoisePath, PathPoint
from sdtrain.errors import ConfigError
from sdtrain.ops.random import Draw


def velocity(x: Tensor, x0: Tensor, at: PathPoint) -> Tensor:
    """dx/dt = d_alpha x0 + d_sigma noise, with the noise that x0 means at x (Song et al. 2021b, equation 13, in path
    form).
    """
    return at.d_alpha * x0 + at.d_sigma * (x - at.alpha * x0) / at.sigma


class Euler:
    """Euler steps in the path's own time: for a rectified flow the straight step of Liu et al. 2022.

    Args:
        num_steps: steps.
        shift: times t' = s t / (1 + (s - 1) t): more of them near the noise for s > 1 (Esser et al. 2024, equation 23).
        heun: correct each step but the last by the slope at its end (Karras et al. 2022, algorithm 1): two
            evaluations a step.
        guidance_scale: of classifier-free guidance, unless the caller says another.
    """

    def __init__(
        self, num_steps: int = 50, shift: float = 1.0, heun: bool = False, guidance_scale: float = 1.0
    ) -> None:
        if num_steps < 1:
            raise ConfigError(f"sampler.num_steps={num_steps} must be at least 1")
        self.num_steps, self.shift, self.heun, self.guidance_scale = num_steps, shift, heun, guidance_scale

    def __call__(
        self,
        denoise: Callable[[Tensor, float], Tensor],
        noise: Tensor,
        path: NoisePath,
        draw: Draw | None = None,  # noqa: ARG002 the signature all samplers share
    ) -> Tensor:
        """noise (B, C, h, w) -> x0."""
        times = torch.linspace(1.0, 0.0, self.num_steps + 1)
        times = self.shift * times / (1 + (self.shift - 1) * times)
        points = path(times)
        x = noise
        for i in range(self.num_steps):
            at, after = (PathPoint(*(v[k] for v in points)) for k in (i, i + 1))
            x0 = denoise(x, float(times[i]))
            if i == self.num_steps - 1:  # at t = 0 the exact end of the step is x0 itself
                return x0
            slope = velocity(x, x0, at)
            step = times[i + 1] - times[i]
            predicted = x + step * slope
            if self.heun:
                slope = (slope + velocity(predicted, denoise(predicted, float(times[i + 1])), after)) / 2
            x = x + step * slope
        return x
