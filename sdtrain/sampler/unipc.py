"""UniPC (Zhao et al. 2023): a multistep predictor, and a corrector that costs no evaluation."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from math import expm1, factorial, log

import torch
from torch import Tensor

from sdtrain.contracts import NoisePath
from sdtrain.diffusion.guidance import UNGUIDED, ClassifierFree
from sdtrain.errors import ConfigError
from sdtrain.ops.random import Draw
from sdtrain.sampler.spacing import Level, Spacing, check, levels, start


def weights(nodes: list[float], h: float) -> list[float]:
    """a of sum_j a_j nodes_j^(k - 1) = -h k! phi_(k + 1)(-h) / B2(h), k = 1, 2, ..., with B2(h) = e^-h - 1 (section 3,
    for data prediction); 1/2 for one node, which keeps the order and is exact where x0 is linear in alpha / sigma.
    """
    if len(nodes) <= 1:
        return [0.5] * len(nodes)
    base = expm1(-h)
    phi, right = base / -h - 1, []
    for k in range(1, len(nodes) + 1):
        right.append(phi * factorial(k) / base)
        phi = phi / -h - 1 / factorial(k + 1)
    matrix = torch.tensor([[node**k for node in nodes] for k in range(len(nodes))], dtype=torch.float64)
    return torch.linalg.solve(matrix, torch.tensor(right, dtype=torch.float64)).tolist()


def advance(x: Tensor, to: Level, known: list[tuple[Level, Tensor]], arrived: Tensor | None = None) -> Tensor:
    """From x at the newest of the known levels (newest first, each with its x0) to `to`: the predictor, or with the x0
    found there the corrector.
    """
    (at, x0), *older = known
    decay = at.alpha * to.sigma / (to.alpha * at.sigma)  # exp(-h), 0 from alpha = 0
    h = -log(decay) if decay else float("inf")
    nodes = [log(level.alpha * at.sigma / (at.alpha * level.sigma)) / h for level, _ in older]
    slopes = [(other - x0) / node for (_, other), node in zip(older, nodes)]
    if arrived is not None:
        nodes, slopes = [*nodes, 1.0], [*slopes, arrived - x0]
    mean = x0
    for weight, slope in zip(weights(nodes, h), slopes):
        mean = mean + weight * slope
    return to.sigma / at.sigma * x + to.alpha * (1 - decay) * mean


class UniPC:
    """UniPC-p in B2(h) with data prediction; the orders of its steps are 1, 2, ..., p, ..., p, ..., 2, 1.

    Args:
        num_steps: evaluations of the denoiser.
        solver_order: p; 2 with guidance, 3 without.
        guidance: how the denoiser is asked.
        shift, spacing: the times, see `spacing.py`.
    """

    def __init__(
        self,
        num_steps: int = 20,
        solver_order: int = 2,
        guidance: ClassifierFree = UNGUIDED,
        shift: float = 1.0,
        spacing: Spacing = "uniform",
    ) -> None:
        check(num_steps, spacing, shift)
        if not 1 <= solver_order <= 3:
            raise ConfigError(f"sampler.solver_order={solver_order} must be 1, 2 or 3")
        self.num_steps, self.solver_order, self.guidance = num_steps, solver_order, guidance
        self.shift, self.spacing = shift, spacing
        self.order = solver_order + 1  # of the error, in 1 / num_steps: the corrector adds one (section 3)

    def __call__(
        self,
        denoise: Callable[[Tensor, float], Tensor],
        noise: Tensor,
        path: NoisePath,
        draw: Draw | None = None,  # noqa: ARG002 the signature all samplers share
    ) -> Tensor:
        """noise (B, C, h, w) -> x0."""
        line = levels(path, self.num_steps, self.spacing, self.shift)
        x = before = start(noise, line[0])
        known: list[tuple[Level, Tensor]] = []
        for i, (at, to) in enumerate(pairwise(line)):
            x0 = denoise(x, at.t)
            if to.sigma == 0:
                return x0
            if known:
                x = advance(before, at, known, x0)
            order = min(self.solver_order, self.num_steps - i)
            known = [(at, x0), *(pair for pair in known if pair[0].alpha > 0)][:order]
            before, x = x, advance(x, to, known)
        return x
