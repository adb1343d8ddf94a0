"""AdamW (Loshchilov and Hutter 2019) with warm-up and decay, over named parameter groups."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch
from torch import nn
from torch.optim.lr_scheduler import LambdaLR

from sdtrain.errors import ConfigError


class AdamW:
    """The recipe of an optimizer; `build` makes it for a stage's parameters.

    Args:
        lr: peak learning rate.
        lr_scale: factor on it for a part, by name: {conditioner: 0.1}.
        weight_decay: on matrices and convolutions; vectors (norms, biases) have none.
        warmup_steps: linear from 0, in optimizer steps.
        decay: after the warm-up: "constant", or "cosine" or "linear" down to `final` of the peak at max_steps.

    Raises:
        ConfigError: for an unknown decay, or a part in lr_scale that the stage does not have.
    """

    def __init__(
        self,
        lr: float = 1e-4,
        lr_scale: Mapping[str, float] | None = None,
        betas: Sequence[float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.01,
        warmup_steps: int = 0,
        decay: Literal["constant", "cosine", "linear"] = "constant",
        final: float = 0.0,
    ) -> None:
        if decay not in ("constant", "cosine", "linear"):
            raise ConfigError(f"optim.decay is constant, cosine or linear, not {decay!r}")
        self.lr, self.lr_scale = lr, dict(lr_scale or {})
        self.betas, self.eps, self.weight_decay = (betas[0], betas[1]), eps, weight_decay
        self.warmup_steps, self.decay, self.final = warmup_steps, decay, final

    def factor(self, step: int, max_steps: int) -> float:
        """Share of the peak learning rate at an optimizer step."""
        if step < self.warmup_steps:
            return (step + 1) / self.warmup_steps
        done = min((step - self.warmup_steps) / max(max_steps - self.warmup_steps, 1), 1.0)
        if self.decay == "cosine":
            return self.final + (1 - self.final) * 0.5 * (1 + math.cos(math.pi * done))
        return 1.0 if self.decay == "constant" else 1.0 - (1 - self.final) * done

    def build(
        self, parts: Mapping[str, Sequence[nn.Parameter]], max_steps: int
    ) -> tuple[torch.optim.Optimizer, LambdaLR]:
        """Parts by name -> one optimizer, whose groups are named after their part, and its schedule in optimizer
        steps.
        """
        unknown = self.lr_scale.keys() - parts.keys()
        if unknown:
            raise ConfigError(
                f"optim.lr_scale names {', '.join(sorted(unknown))}; this stage trains {', '.join(parts)}"
            )
        groups = []
        for name, parameters in parts.items():
            lr = self.lr * self.lr_scale.get(name, 1.0)
            learned = [p for p in parameters if p.requires_grad]
            for matrices, decay in ((True, self.weight_decay), (False, 0.0)):
                chosen = [p for p in learned if (p.dim() >= 2) == matrices]
                if chosen:
                    groups.append({"params": chosen, "lr": lr, "weight_decay": decay, "name": name})
        optimizer = self.make(groups)
        return optimizer, LambdaLR(optimizer, lambda step: self.factor(step, max_steps))

    def make(self, groups: list[dict[str, Any]]) -> torch.optim.Optimizer:
        """The optimizer of finished groups."""
        return torch.optim.AdamW(groups, betas=self.betas, eps=self.eps, fused=True)
