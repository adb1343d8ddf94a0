"""Euler and Heun on the probability-flow ODE (Song et al. 2021b, equation 13)."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise

from torch import Tensor

from sdtrain.contracts import NoisePath
from sdtrain.diffusion.guidance import UNGUIDED, ClassifierFree
from sdtrain.ops.random import Draw
from sdtrain.sampler.spacing import Level, Spacing, check, levels, start

FAR = 1000.0  # from a sigma / alpha above it, or infinite, Heun's first steps in that variable would be all error


def tangent(x: Tensor, x0: Tensor, at: Level) -> Tensor:
    """The noise that an x0 at x means."""
    return (x - at.alpha * x0) / at.sigma


class Euler:
    """x_s = alpha_s x0 + sigma_s noise with the x0 and noise of x_t: an Euler step in x / alpha over sigma / alpha
    (Karras et al. 2022), and also the straight step of a rectified flow (Liu et al. 2022).

    Args:
        num_steps: steps.
        shift, spacing: the times, see `spacing.py`.
        heun: correct each step but the last by the slope at its end (Karras et al. 2022, algorithm 1): two
            evaluations a step. Here the variable does matter: it is sigma / alpha, or where a path starts at an (all
            but) infinite one, sigma / (alpha + sigma), which for a rectified flow is t.
        guidance: how the denoiser is asked.
    """

    def __init__(
        self,
        num_steps: int = 50,
        shift: float = 1.0,
        heun: bool = False,
        guidance: ClassifierFree = UNGUIDED,
        spacing: Spacing = "uniform",
    ) -> None:
        check(num_steps, spacing, shift)
        self.num_steps, self.shift, self.heun, self.guidance = num_steps, shift, heun, guidance
        self.spacing = spacing
        self.order = 2 if heun else 1  # of the error, in 1 / num_steps

    def __call__(
        self,
        denoise: Callable[[Tensor, float], Tensor],
        noise: Tensor,
        path: NoisePath,
        draw: Draw | None = None,  # noqa: ARG002 the signature all samplers share
    ) -> Tensor:
        """noise (B, C, h, w) -> x0."""
        line = levels(path, self.num_steps, self.spacing, self.shift)
        x, is_far = start(noise, line[0]), line[0].sigma > FAR * line[0].alpha
        for at, to in pairwise(line):
            x0 = denoise(x, at.t)
            if to.sigma == 0:
                return x0
            n = tangent(x, x0, at)
            end = to.alpha * x0 + to.sigma * n
            if self.heun:
                end_x0 = denoise(end, to.t)
                x0, n = (x0 + end_x0) / 2, (n + tangent(end, end_x0, to)) / 2
                gain = (to.alpha + to.sigma) / (at.alpha + at.sigma) if is_far else to.alpha / at.alpha
                end = gain * x + (to.alpha - gain * at.alpha) * x0 + (to.sigma - gain * at.sigma) * n
            x = end
        return x
