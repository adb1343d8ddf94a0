"""Which samples every optimizer step takes: a pure function of the index, the seed and one small state. Nothing here
reads data.

Block b is a pool of samples: each source's next ones, as many as its weight says, all permuted. Without buckets, steps
follow each other through the pools; with buckets a pool is dealt into cells of one shape. What fills no step is carried
into the next block. There is no rank and no worker in it.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from typing import Any, NamedTuple, TypedDict

import numpy as np

from sdtrain.data.bucket import Table, deal
from sdtrain.data.index import Index
from sdtrain.data.order import Order, permutation
from sdtrain.errors import ConfigError

BLOCK_SAMPLES = 1 << 18
_VERSION = 2
_WHERE = {
    "v": "the version of sdtrain",
    "seed": "seed",
    "global_batch": "trainer.batch_size",
    "fingerprint": "data.shards or data.sources, or what is in them",
}


class Segment(NamedTuple):
    """From this block on, these are the sources' weights."""

    block: int
    weights: tuple[Fraction, ...]


class Cursor(TypedDict):
    """A place in the plan: after so many steps, of them so many in this block, which began with what was carried."""

    step: int
    block: int
    step_in_block: int
    carry: str  # "id:epoch id:epoch ...": one value, so that nobody who moves batches walks through its numbers


class MicroBatch(NamedTuple):
    """What one rank trains on at once."""

    ids: np.ndarray  # (b,) int64
    epochs: np.ndarray  # (b,) int64
    size: tuple[int, int] | None  # height and width of all of them; None: the data's own square
    places: np.ndarray  # (b,) int64, where in the step each stands


START = Cursor(step=0, block=0, step_in_block=0, carry="")


@dataclass(frozen=True, eq=False)
class Layout:
    """How a step is made of cells, each of one shape.

    Args:
        table: the shapes.
        index: says the width and height of every sample; workers get it as the reader's, which is the same object.
        cell: the samples of a cell.
        is_synchronous: a cell is spread over all ranks, so that they have the same shape at the same time.
    """

    table: Table
    index: Index
    cell: int
    is_synchronous: bool = False

    def bucket(self, ids: np.ndarray) -> np.ndarray:
        """The numbers of some samples' shapes, (n,) uint8."""
        return self.table.of(self.index.side[ids])


@dataclass(frozen=True, eq=False)
class Plan:
    """The order of all samples.

    Args:
        orders: the sources.
        seed: the run's.
        global_batch_size: the samples of an optimizer step.
        weights: how much of the pools each source gives; exact, so fractions.
        fingerprint: of the data, for the saved state.
        layout: the cells of a step; None: every sample is of the same shape.
        block_samples: about how many samples are permuted together.
        segments: the weights before these, and where they ended.
    """

    orders: Sequence[Order]
    seed: int
    global_batch_size: int
    weights: tuple[Fraction, ...] = (Fraction(1),)
    fingerprint: str = ""
    layout: Layout | None = None
    block_samples: int = BLOCK_SAMPLES
    segments: tuple[Segment, ...] = ()

    def __post_init__(self) -> None:
        if not self.segments:
            object.__setattr__(self, "segments", (Segment(0, self.weights),))
        least = min(weight for weight in self.weights if weight) / sum(self.weights)
        if least * self.pool_samples < 1:
            raise ConfigError(
                f"data.sources: a weight of {float(least):.3g} gives less than one sample in a block of "
                f"{self.pool_samples}; raise it, or write 0"
            )
        if self.layout is not None and self.global_batch_size % self.layout.cell:
            raise ConfigError(
                f"trainer.batch_size: {self.global_batch_size} samples a step are no multiple of data.buckets.cell, "
                f"{self.layout.cell} samples of one shape"
            )

    @property
    def pool_samples(self) -> int:
        """How many samples every block adds: whole steps of a large data set; of a small one, one epoch."""
        whole = max(self.block_samples // self.global_batch_size, 1) * self.global_batch_size
        weights = self.segments[0].weights
        least = min(weight for weight in weights if weight) / sum(weights)
        return max(min(whole, sum(map(len, self.orders))), min(math.ceil(1 / least), self.block_samples))

    def given(self, block: int) -> list[int]:
        """How many samples each source gave to the blocks before this one: floor(Q_k T) - floor(Q_{k-1} T) after T."""
        given = [0] * len(self.orders)
        ends = [segment.block for segment in self.segments[1:]] + [block]
        for (first, weights), end in zip(self.segments, ends):
            num = max(min(end, block) - first, 0) * self.pool_samples
            total, before, cumulative = sum(weights), 0, Fraction(0)
            for k, weight in enumerate(weights):
                cumulative += weight
                up_to = math.floor(cumulative * num / total)
                given[k] += up_to - before
                before = up_to
        return given

    def pool(self, block: int) -> np.ndarray:
        """The samples that a block adds, (n, 2) int64: sample ids and epochs."""
        bounds = zip(self.orders, self.given(block), self.given(block + 1))
        taken = np.concatenate([order.take(self.seed, first, last) for order, first, last in bounds])
        return taken[permutation(len(taken), f"{self.seed}/pool", block)]

    def block(self, block: int, carry: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The steps of a block, (n, B, 2) int64, and what it leaves for the next one, (m, 2)."""
        samples, size = np.concatenate([carry, self.pool(block)]), self.global_batch_size
        if self.layout is None:
            end = len(samples) // size * size
            return samples[:end].reshape(-1, size, 2), samples[end:]  # (steps, B, 2)
        cell = self.layout.cell
        bucket = self.layout.bucket(samples[:, 0])
        places, rest = deal(bucket, len(carry), cell, size // cell, f"{self.seed}/cells", block)
        return samples[places], samples[rest]

    def walk(self, cursor: Cursor = START) -> Iterator[tuple[np.ndarray, Cursor]]:
        """Every step from a place on, (B, 2) int64, with the place after it. Without end."""
        step, block, done, carried = cursor["step"], cursor["block"], cursor["step_in_block"], cursor["carry"]
        carry = _read_carry(carried)
        while True:
            steps, rest = self.block(block, carry)
            for number in range(done, len(steps)):
                step += 1
                yield steps[number], Cursor(step=step, block=block, step_in_block=number + 1, carry=carried)
            block, done, carry, carried = block + 1, 0, rest, _write_carry(rest)

    def micro_batches(self, step: np.ndarray, rank: int, world: int, num_accumulate: int) -> list[MicroBatch]:
        """A rank's equal parts of a step: a contiguous run of it or, of synchronous cells, a contiguous run of each."""
        groups = self.global_batch_size // self.layout.cell if self.layout and self.layout.is_synchronous else 1
        places = np.arange(len(step)).reshape(groups, world, num_accumulate // groups, -1)[:, rank]  # (G, A / G, b)
        places = places.reshape(num_accumulate, -1)  # (A, b)
        parts = step[places]  # (A, b, 2)
        sizes: list[Any] = [None] * num_accumulate
        if self.layout is not None:
            sizes = [self.layout.table.shapes[number] for number in self.layout.bucket(parts[:, 0, 0])]
        return [MicroBatch(part[:, 0], part[:, 1], size, place) for part, size, place in zip(parts, sizes, places)]

    def epochs(self, cursor: Cursor) -> dict[str, float]:
        """How often each source was gone through, in thousandths: epoch, or epoch/<name> where they have names."""
        part = (
            cursor["step_in_block"] * self.global_batch_size - len(_read_carry(cursor["carry"]))
        ) / self.pool_samples
        bounds = zip(self.orders, self.given(cursor["block"]), self.given(cursor["block"] + 1))
        return {
            f"epoch/{order.name}".rstrip("/"): round((first + min(max(part, 0), 1) * (last - first)) / len(order), 3)
            for order, first, last in bounds
            if len(order)
        }

    def check_split(self, world: int, num_accumulate: int) -> None:
        """Refuses ranks and micro-batches among which a step does not divide, with those among which it does."""

        def fits(world: int, num_accumulate: int) -> bool:
            if self.global_batch_size % (world * num_accumulate):
                return False
            if self.layout is None:
                return True
            num_cells = self.global_batch_size // self.layout.cell
            return (num_accumulate if self.layout.is_synchronous else world * num_accumulate) % num_cells == 0

        if fits(world, num_accumulate):
            return
        counts = range(1, self.global_batch_size + 1)
        cells = "" if self.layout is None else f" in cells of {self.layout.cell} of one shape"
        raise ConfigError(
            f"trainer.batch_size: {self.global_batch_size} samples a step{cells} do not divide among {world} ranks x "
            f"{num_accumulate} micro-batches. With num_accumulate={num_accumulate} the number of ranks may be one of "
            f"{[n for n in counts if fits(n, num_accumulate)]}; with {world} ranks num_accumulate may be one of "
            f"{[n for n in counts if fits(world, n)]}"
        )

    def state(self, cursor: Cursor) -> dict[str, Any]:
        """A place as a checkpoint keeps it: plain values, identical on every rank."""
        segments = [[block, [str(weight) for weight in weights]] for block, weights in self.segments]
        return self._own() | {"segments": segments, **cursor}

    def _own(self) -> dict[str, Any]:
        layout = self.layout
        return {
            "v": _VERSION,
            "seed": self.seed,
            "global_batch": self.global_batch_size,
            "buckets": layout and {**layout.table.describe(), "is_synchronous": layout.is_synchronous},
            "buckets.cell": layout and layout.cell,
            "fingerprint": self.fingerprint,
            "block_samples": self.block_samples,
        }

    def resume(self, state: Mapping[str, Any]) -> tuple[Plan, Cursor]:
        """The plan as it goes on from a saved state, and the place. Other weights than it had begin at the next block.

        Raises:
            ConfigError: for the state of another order, naming the field.
        """
        for field, here in self._own().items():
            there = state.get(field)
            if there != here:
                raise ConfigError(
                    f"data.{field}: the checkpoint was written with {there!r}, this run has {here!r}; the order of the "
                    f"samples would change. Restore {_WHERE.get(field, f'data.{field}')}, or start a new output_dir"
                )
        cursor = Cursor(**{name: state[name] for name in START})
        segments = [Segment(block, tuple(map(Fraction, weights))) for block, weights in state["segments"]]
        if segments[-1].weights != self.weights:
            first = cursor["block"] + (cursor["step_in_block"] > 0)
            segments = [segment for segment in segments if segment.block < first] + [Segment(first, self.weights)]
        return replace(self, segments=tuple(segments)), cursor


def _write_carry(carry: np.ndarray) -> str:
    return " ".join(f"{sample}:{epoch}" for sample, epoch in carry.tolist())


def _read_carry(text: str) -> np.ndarray:
    return np.array([pair.split(":") for pair in text.split()], np.int64).reshape(-1, 2)  # (n, 2)
