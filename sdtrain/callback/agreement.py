"""What all ranks decide together, without the device and without waiting for each other."""

from __future__ import annotations

from typing import Any

import torch
from lightning.pytorch import Trainer
from torch import Tensor, distributed


class Agreement:
    """The largest of the numbers that the ranks say, over gloo: the accelerator never waits.

    Every rank makes it, and calls it, at the same places. With one rank its own word counts at once.
    """

    def __init__(self, trainer: Trainer) -> None:
        self._world_size = trainer.world_size
        self._group = distributed.new_group(backend="gloo") if trainer.world_size > 1 else None
        self._pending: tuple[Any, Tensor] | None = None

    def late(self, value: int) -> int:
        """What the ranks said in the call before this one. Its answer has had a step to come."""
        if self._group is None:
            return value
        before, said = self._take(), torch.tensor([value])
        self._pending = (self._start(said), said)
        return before

    def now(self, value: int) -> int:
        """What the ranks say in this call or said in the one before."""
        if self._group is None:
            return value
        before, said = self._take(), torch.tensor([value])
        self._start(said).wait()
        return max(before, int(said))

    def gather(self, value: Any) -> list[Any]:  # noqa: ANN401 anything that can be pickled
        """What each rank says, by rank."""
        if self._group is None:
            return [value]
        said: list[Any] = [None] * self._world_size
        distributed.all_gather_object(said, value, group=self._group)
        return said

    def _start(self, said: Tensor) -> Any:  # noqa: ANN401 a handle of torch's
        return distributed.all_reduce(said, distributed.ReduceOp.MAX, group=self._group, async_op=True)

    def _take(self) -> int:
        if self._pending is None:
            return 0
        work, said = self._pending
        self._pending = None
        work.wait()
        return int(said)
