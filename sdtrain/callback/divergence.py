"""Whether the ranks still hold the same weights: a bad memory, a lost collective or a bug lets them drift apart."""

from __future__ import annotations

from collections import Counter

import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor
from typing_extensions import override

from sdtrain.callback.every import EverySteps
from sdtrain.errors import RunError

_INTEGERS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


class Divergence(EverySteps):
    """Every `every_steps` optimizer steps, and at the last one, the ranks compare the bits of their learned weights.

    Each rank sends one number; only where these differ, one for each parameter. A rank that differs ends the run with
    78, before its weights reach a checkpoint. Weights that are sharded (ZeRO-3) have nothing to compare.
    """

    def __init__(self, every_steps: int = 1000) -> None:
        super().__init__(every_steps)

    @override
    def act(self, trainer: Trainer, pl_module: LightningModule) -> None:
        named = [(name, p) for name, p in pl_module.named_parameters() if p.requires_grad and p.numel()]
        if trainer.world_size == 1 or not named:
            return
        sums = bit_sums([p for _, p in named])
        # Odd factors, so that two parameters cannot change against each other.
        factors = torch.arange(1, 2 * len(sums), 2, device=sums.device)
        if len(set(trainer.strategy.all_gather((sums * factors).sum()).tolist())) == 1:
            return
        table = trainer.strategy.all_gather(sums).view(trainer.world_size, -1)  # (ranks, parameters)
        name = named[int((table != table[0]).any(dim=0).nonzero()[0])][0]
        ranks = differing([tuple(row) for row in table.tolist()])
        raise RunError(
            f"the ranks diverged: at step {trainer.global_step} rank {', '.join(map(str, ranks))} has other weights, "
            f"{name} first; run the same command again, without the machine of that rank if it happens again",
            78,
        )


def bit_sums(tensors: list[Tensor]) -> Tensor:
    """(N,) int64: the sum of each tensor's bits, taken as integers. It overflows alike everywhere."""
    with torch.no_grad():
        return torch.stack([t.detach().view(_INTEGERS[t.element_size()]).sum(dtype=torch.int64) for t in tensors])


def differing(rows: list[tuple[int, ...]]) -> list[int]:
    """The ranks that are not like most; of two halves that are as large, the one without rank 0."""
    counts = Counter(rows)
    most = max(counts, key=lambda row: (counts[row], row == rows[0]))
    return [rank for rank, row in enumerate(rows) if row != most]
