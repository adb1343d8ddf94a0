"""Exponential moving average of weights, updated once an optimizer step by foreach operations."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn


class EMA:
    """Averaged copies of named parameters.

    The decay warms up as min(decay, (1 + n) / (warmup + n)) after n updates, so that early averages forget the
    initial weights.

    Args:
        named: what is averaged.
        decay: of a long run, per optimizer step.
        warmup: larger is slower; 10 as in TensorFlow's ExponentialMovingAverage.
    """

    def __init__(self, named: Iterable[tuple[str, nn.Parameter]], decay: float, warmup: float = 10.0) -> None:
        pairs = list(named)
        self.names, self.parameters = [name for name, _ in pairs], [p for _, p in pairs]
        self.decay, self.warmup, self.num_updates = decay, warmup, 0
        self.shadow = [p.detach().clone() for p in self.parameters]

    @torch.no_grad()
    def update(self) -> None:
        """shadow <- decay shadow + (1 - decay) weights."""
        decay = min(self.decay, (1 + self.num_updates) / (self.warmup + self.num_updates))
        self.num_updates += 1
        torch._foreach_lerp_(self.shadow, [p.detach() for p in self.parameters], 1.0 - decay)

    @contextmanager
    def swapped(self) -> Iterator[None]:
        """The module holds the averaged weights inside the block, and its own bits again after it."""
        own = [p.data for p in self.parameters]
        try:
            for p, shadow in zip(self.parameters, self.shadow):
                p.data = shadow
            yield
        finally:
            for p, data in zip(self.parameters, own):
                p.data = data

    def state_dict(self) -> dict[str, Tensor]:
        """Averaged weights by parameter name, and the number of updates."""
        return dict(zip(self.names, self.shadow)) | {"num_updates": torch.tensor(self.num_updates)}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Strict: every parameter, nothing else.

        Raises:
            KeyError: for a missing or unexpected name.
        """
        state = dict(state)
        self.num_updates = int(state.pop("num_updates"))
        if state.keys() != set(self.names):
            raise KeyError(f"EMA does not fit: {sorted(state.keys() ^ set(self.names))[:4]}")
        for name, shadow in zip(self.names, self.shadow):
            shadow.copy_(state[name])
