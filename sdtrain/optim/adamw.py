"""AdamW (Loshchilov and Hutter 2019) with warm-up and decay, over named parameter groups."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.optim.adamw import adamw
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
        ConfigError: for an unknown decay, a value out of its range, or a part in lr_scale that the stage does not have.
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
        for name, value in {"lr": lr, "weight_decay": weight_decay, "warmup_steps": warmup_steps}.items():
            if value < 0:
                raise ConfigError(f"optim.{name}={value} must be 0 or more")
        if len(betas) != 2 or not all(0 <= beta < 1 for beta in betas):
            raise ConfigError(f"optim.betas={list(betas)} must be two numbers from 0 on and below 1")
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
        return OnePass(groups, self.betas, self.eps)


class OnePass(torch.optim.AdamW):
    """torch's fused AdamW and the clipping of gradients in one pass over memory, with the states of torch's.

    What is channels-last is taken in the order in which it lies there: torch's CPU kernel would make copies of weight,
    gradient and moments, and write them back.
    """

    def __init__(self, groups: list[dict[str, Any]], betas: tuple[float, float], eps: float) -> None:
        super().__init__(groups, betas=betas, eps=eps, fused=True)
        self._step_supports_amp_scaling = False  # fp16's are unscaled before their norm is taken, not in the step
        self._divisors: dict[str, Tensor] = {}

    def clip(self, norms: Mapping[str, Tensor], max_norm: float) -> None:
        """Has the next step divide gradients, by the name of their group, whose norm is above `max_norm`. They are
        clipped in `.grad` once it has been made.
        """
        self._divisors = {name: ((norm.float() + 1e-6) / max_norm).clamp(min=1.0) for name, norm in norms.items()}

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # noqa: ANN401 torch's signature
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()  # Lightning's: it also clips
        for group in self.param_groups:
            self.step_group(group, self._divisors.get(group["name"]))
        self._divisors = {}
        return loss

    def step_group(self, group: dict[str, Any], divisor: Tensor | None) -> None:
        """The step of one group, whose gradients are divided first."""
        parameters, gradients, means, squares, _, steps = lists = [[] for _ in range(6)]
        self._init_group(group, *lists)
        adamw(
            *(_as_it_lies(tensors, parameters) for tensors in (parameters, gradients, means, squares)),
            [],
            steps,
            fused=True,
            grad_scale=divisor,
            amsgrad=False,
            beta1=group["betas"][0],
            beta2=group["betas"][1],
            lr=group["lr"],
            weight_decay=group["weight_decay"],
            eps=group["eps"],
            maximize=False,
        )


def _as_it_lies(tensors: Sequence[Tensor], parameters: Sequence[Tensor]) -> list[Tensor]:
    """Views whose dimensions stand in the order of the parameters' strides; of contiguous ones, themselves."""
    return [
        t if p.is_contiguous() else t.permute(sorted(range(p.dim()), key=p.stride, reverse=True))
        for t, p in zip(tensors, parameters)
    ]
