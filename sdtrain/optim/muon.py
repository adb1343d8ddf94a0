"""Muon (Jordan et al. 2024): momentum whose matrices are orthogonalised, with AdamW for what is no matrix; one
optimizer.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn

from sdtrain.optim.adamw import AdamW, OnePass

_COEFFICIENTS = (3.4445, -4.7750, 2.0315)  # of the quintic that takes singular values to about 1


def orthogonalise(matrices: Tensor, dtype: torch.dtype = torch.float32, num_iterations: int = 5) -> Tensor:
    """(N, rows, columns) -> the nearest semi-orthogonal matrices, about, by Newton and Schulz's iteration:
    x <- a x + b (x x^T) x + c (x x^T)^2 x, on the shorter side.

    The singular values end between 0.7 and 1.2. In bfloat16 they still do: x itself is iterated, whose rounding the
    next step undoes, not a polynomial of x x^T, whose rounding stays.
    """
    a, b, c = _COEFFICIENTS
    x = matrices / (matrices.norm(dim=(1, 2), keepdim=True) + 1e-7)
    transposed = x.shape[1] > x.shape[2]
    x = (x.mT if transposed else x).to(dtype).contiguous()
    for _ in range(num_iterations):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    x = x.to(matrices.dtype)
    return x.mT if transposed else x


class _Muon(OnePass):
    """AdamW, but for the groups that say `orthogonal`: there the step is the orthogonalised Nesterov momentum."""

    def __init__(
        self, groups: list[dict[str, Any]], betas: tuple[float, float], eps: float, dtype: torch.dtype
    ) -> None:
        super().__init__(groups, betas, eps)
        self.dtype = dtype  # not the groups': they come back with a checkpoint, and it is the run's

    def step_group(self, group: dict[str, Any], divisor: Tensor | None) -> None:
        if not group["orthogonal"]:
            super().step_group(group, divisor)
            return
        shapes: dict[tuple[int, int], list[tuple[nn.Parameter, Tensor]]] = {}
        for p in group["params"]:
            if p.grad is None:
                continue
            state = self.state[p]
            if not state:  # AdamW's own loading looks for a step in every state
                state.update(step=torch.zeros(()), momentum=torch.zeros_like(p))
            state["step"] += 1
            if divisor is not None:
                p.grad.div_(divisor)
            buffer = state["momentum"]
            buffer.lerp_(p.grad, 1 - group["momentum"])
            update = p.grad.lerp(buffer, group["momentum"]).flatten(1)  # (out, in kh kw)
            shapes.setdefault((update.shape[0], update.shape[1]), []).append((p, update))
        for (rows, columns), members in shapes.items():
            updates = orthogonalise(torch.stack([update for _, update in members]), self.dtype)
            # A root-mean-square of 0.2 an element whatever the shape, so that AdamW's rates carry over (Liu et al.
            # 2025).
            scale = 0.2 * max(rows, columns) ** 0.5
            for (p, _), update in zip(members, updates):
                p.mul_(1 - group["lr"] * group["weight_decay"])
                p.add_(update.view(p.shape), alpha=-group["lr"] * scale)


class Muon(AdamW):
    """The recipe: matrices, tables and convolutions by Muon, vectors by AdamW, under one schedule.

    Args:
        momentum: of the matrices' gradients.
        precision: of the run, as Lightning names it. Unless it is of 32 or 64 bits, matrices are orthogonalised in
            bfloat16, as Jordan et al. do: 2 to 7 times as fast where a processor multiplies it.
        lr, lr_scale, betas, eps, weight_decay, warmup_steps, decay, final: as AdamW's, and of about its size.
    """

    def __init__(
        self,
        lr: float = 1e-3,
        lr_scale: Mapping[str, float] | None = None,
        betas: Sequence[float] = (0.9, 0.99),
        eps: float = 1e-8,
        weight_decay: float = 0.01,
        warmup_steps: int = 0,
        decay: Literal["constant", "cosine", "linear"] = "constant",
        final: float = 0.0,
        momentum: float = 0.95,
        precision: str = "32-true",
    ) -> None:
        super().__init__(lr, lr_scale, betas, eps, weight_decay, warmup_steps, decay, final)
        self.momentum = momentum
        self.dtype = torch.float32 if precision.startswith(("32", "64")) else torch.bfloat16

    def make(self, groups: list[dict[str, Any]]) -> torch.optim.Optimizer:
        """Splits the matrices from the rest."""
        split = []
        for group in groups:
            for orthogonal in (True, False):
                chosen = [p for p in group["params"] if _is_matrix(p) == orthogonal]
                if chosen:
                    split.append(group | {"params": chosen, "orthogonal": orthogonal, "momentum": self.momentum})
        return _Muon(split, self.betas, self.eps, self.dtype)


def _is_matrix(p: nn.Parameter) -> bool:
    return p.dim() >= 2 and min(p.shape[0], p[0].numel()) > 1
