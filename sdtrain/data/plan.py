"""The order of all samples, as a pure function of (seed, number of samples, step). Nothing here reads data.

Epoch e is a permutation drawn from Philox keyed by (seed, e); epochs follow each other without end; optimizer step s
takes the positions [s B, (s+1) B). So a position is one number, the same on every rank, with no rank or worker count in
it.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from sdtrain.errors import ConfigError

_VERSION = 1
_WHERE = {"seed": "seed", "global_batch": "trainer.batch_size", "fingerprint": "data.shards, or what is in them"}


@functools.lru_cache(maxsize=4)
def epoch_order(num_samples: int, seed: int, epoch: int) -> np.ndarray:
    """The permutation of an epoch. NumPy promises a bit generator's raw words for ever, `permutation` it does not."""
    words = np.random.Philox(key=np.array([seed, epoch], dtype=np.uint64)).random_raw(num_samples)
    order = np.argsort(words, kind="stable")
    order.setflags(write=False)
    return order


@dataclass(frozen=True)
class Plan:
    """Which samples every optimizer step takes, and the state that says where a run stands."""

    num_samples: int
    seed: int
    global_batch_size: int
    fingerprint: str = ""

    def take(self, step: int) -> tuple[np.ndarray, np.ndarray]:
        """The sample ids and epoch numbers of a step, (B,) int64 each; a small set comes round within the batch."""
        first = step * self.global_batch_size
        positions = np.arange(first, first + self.global_batch_size)
        epochs, places = np.divmod(positions, self.num_samples)
        ids = np.empty_like(positions)
        for epoch in range(epochs[0], epochs[-1] + 1):
            here = epochs == epoch
            ids[here] = epoch_order(self.num_samples, self.seed, epoch)[places[here]]
        return ids, epochs

    def micro_batches(
        self, step: int, rank: int, world: int, num_accumulate: int
    ) -> list[tuple[np.ndarray, np.ndarray]]:
        """A rank's contiguous part of a step, cut into equal micro-batches."""
        parts = world * num_accumulate
        if self.global_batch_size % parts:
            fits = [n for n in range(1, self.global_batch_size + 1) if self.global_batch_size % n == 0]
            raise ConfigError(
                f"trainer.batch_size: {self.global_batch_size} samples a step do not divide among {world} ranks x "
                f"{num_accumulate} micro-batches = {parts}; ranks x micro-batches may be one of {fits}"
            )
        ids, epochs = (np.split(values, parts) for values in self.take(step))
        mine = slice(rank * num_accumulate, (rank + 1) * num_accumulate)
        return list(zip(ids[mine], epochs[mine]))

    def state(self, step: int) -> dict[str, Any]:
        """The state once `step` optimizer steps are done: plain values, identical on every rank."""
        return {
            "v": _VERSION,
            "step": step,
            "seed": self.seed,
            "global_batch": self.global_batch_size,
            "fingerprint": self.fingerprint,
        }

    def step_of(self, state: Mapping[str, Any]) -> int:
        """The step a saved state stands at. A state of another order is refused, naming the field."""
        for field, here in self.state(0).items():
            there = state.get(field)
            if field != "step" and there != here:
                raise ConfigError(
                    f"data.{field}: the checkpoint was written with {there!r}, this run has {here!r}; "
                    f"the order of the samples would change. Restore {_WHERE.get(field, 'the version of sdtrain')}, "
                    "or start a new output_dir"
                )
        return int(state["step"])
