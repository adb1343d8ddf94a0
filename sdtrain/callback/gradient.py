"""Gradient norms of the network's blocks: where in it training is alive, and where it blows up first."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor, nn
from typing_extensions import override

from sdtrain.errors import ConfigError


class Gradient(Callback):
    """Every `every_steps` optimizer steps, and at the last one, the norm of each top-level block's gradients before
    they are clipped, as `grad_norm/<part>/<block>` of the row of that step: give it the interval of `log`.

    The norms stay on the device until the row is written. A strategy that keeps gradients in pieces says so by
    `has_whole_gradients`, and they are left out.
    """

    def __init__(self, every_steps: int) -> None:
        if every_steps < 1:
            raise ConfigError(f"gradient.every_steps={every_steps} must be 1 or more")
        self.every_steps = every_steps

    @override
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._is_whole = getattr(trainer.strategy, "has_whole_gradients", True)
        if trainer.is_global_zero and not self._is_whole:
            print(
                f"{pl_module.context.stage}: no gradient norms by block, this strategy keeps gradients in pieces",
                flush=True,
            )

    @override
    def on_before_optimizer_step(
        self, trainer: Trainer, pl_module: LightningModule, optimizer: torch.optim.Optimizer
    ) -> None:
        step = trainer.global_step + 1
        if self._is_whole and (step % self.every_steps == 0 or step == trainer.max_steps):
            norms = block_norms(pl_module.named_parameters())
            pl_module.note(**{f"grad_norm/{block}": norm for block, norm in norms.items()})


def block_norms(named: Iterable[tuple[str, nn.Parameter]]) -> dict[str, Tensor]:
    """The norm of the gradients of each block, on their device; nothing of what has none."""
    found = [(block_of(name), p.grad) for name, p in named if p.grad is not None]
    if not found:
        return {}
    blocks: dict[str, list[Tensor]] = {}
    for (block, _), norm in zip(found, torch._foreach_norm([grad for _, grad in found], 2, torch.float32)):
        blocks.setdefault(block, []).append(norm)
    return {block: torch.linalg.vector_norm(torch.stack(norms)) for block, norms in blocks.items()}


def block_of(name: str) -> str:
    """model/conv_in of model.conv_in.weight, model/down_blocks.0 of model.down_blocks.0.resnets.1.conv1.weight."""
    part, *rest = name.split(".")
    length = 2 if len(rest) > 2 and rest[1].isdigit() else 1
    return "/".join((part, ".".join(rest[:length])))
