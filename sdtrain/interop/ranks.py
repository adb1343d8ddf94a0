"""The processes of an evaluation: torchrun starts them, and each draws and reads its share."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist

from sdtrain.metric.distribution import shares


@dataclass(frozen=True)
class Ranks:
    """Which of how many processes this is, as torchrun says."""

    rank: int = 0
    world_size: int = 1

    @classmethod
    @contextmanager
    def joined(cls) -> Iterator[Ranks]:
        """Joins the process group where there is one to join, and leaves it."""
        world_size = int(os.environ.get("WORLD_SIZE", "1"))
        if world_size == 1:
            yield cls()
            return
        if torch.cuda.is_available():
            torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
        dist.init_process_group("cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo")
        try:
            yield cls(dist.get_rank(), world_size)
        finally:
            dist.destroy_process_group()

    @property
    def device(self) -> str:
        """This process's own."""
        return f"cuda:{os.environ.get('LOCAL_RANK', '0')}" if torch.cuda.is_available() else "cpu"

    def sum(self, values: Sequence[float]) -> list[float]:
        """Over all ranks, in float64."""
        total = torch.tensor(list(values), dtype=torch.float64)
        if self.world_size > 1:
            dist.all_reduce(total)
        return total.tolist()

    def join(self, own: dict[int, Any]) -> list[Any]:
        """What every rank holds, in the order of its numbers."""
        held: list[dict[int, Any]] = [own]
        if self.world_size > 1:
            held = [own] * self.world_size
            dist.all_gather_object(held, own)
        joined = {key: value for part in held for key, value in part.items()}
        return [joined[key] for key in sorted(joined)]

    def batches(self, num: int, size: int) -> Iterator[tuple[int, list[int]]]:
        """This rank's batches of the places 0 to num - 1, with their numbers. None is padded, none comes twice."""
        return (share for share in shares(num, size, self.rank, self.world_size) if share[1])
