"""DPM-Solver++ 2M (Lu et al. 2022b, algorithm 2) and its SDE variant."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from math import inf, log, sqrt

from torch import Tensor

from sdtrain.contracts import NoisePath
from sdtrain.diffusion.guidance import UNGUIDED, ClassifierFree
from sdtrain.ops.random import Draw
from sdtrain.sampler.spacing import Spacing, check, levels, start


class DPMpp:
    """Exact in x, of second order in x0 over lambda = log(alpha / sigma), from the last two x0; one evaluation a step.

    The first and the last step are of first order, and so is the second after a start at alpha = 0 (lambda = -inf).

    Args:
        num_steps: evaluations of the denoiser.
        sde: solve the reverse SDE instead of the ODE (SDE-DPM-Solver++ 2M): noise in each step.
        guidance: how the denoiser is asked.
        shift, spacing: the times, see `spacing.py`.
    """

    order = 2

    def __init__(
        self,
        num_steps: int = 25,
        sde: bool = False,
        guidance: ClassifierFree = UNGUIDED,
        shift: float = 1.0,
        spacing: Spacing = "uniform",
    ) -> None:
        check(num_steps, spacing, shift)
        self.num_steps, self.sde, self.guidance = num_steps, sde, guidance
        self.shift, self.spacing = shift, spacing

    def __call__(
        self, denoise: Callable[[Tensor, float], Tensor], noise: Tensor, path: NoisePath, draw: Draw | None = None
    ) -> Tensor:
        """noise (B, C, h, w) -> x0.

        Raises:
            ValueError: for the SDE without a draw.
        """
        if self.sde and draw is None:
            raise ValueError("DPM-Solver++ with sde needs a draw for the noise of its steps")
        line = levels(path, self.num_steps, self.spacing, self.shift)
        x, before, h_before = start(noise, line[0]), None, inf
        for i, (at, to) in enumerate(pairwise(line)):
            x0 = denoise(x, at.t)
            if to.sigma == 0:
                return x0
            decay = at.alpha * to.sigma / (to.alpha * at.sigma)  # exp(-h), 0 from alpha = 0
            h = -log(decay) if decay else inf
            ahead = x0 if h_before == inf else x0 + 0.5 * h / h_before * (x0 - before)
            kept = decay if self.sde else 1.0
            x = to.sigma / at.sigma * kept * x + to.alpha * (1 - decay * kept) * ahead
            if self.sde:
                x = x + to.sigma * sqrt(1 - decay**2) * draw.normal(f"dpmpp.{i}", x.shape[1:])
            before, h_before = x0, h
        return x
