"""Planning a hundred million samples, and going on from the middle of them: time and memory, on one core.

python tools/bench/plan.py

The limit beside each figure is what no plan of this kind can do without: two random words a sample and their sorts.
"""

from __future__ import annotations

import time
import tracemalloc
from collections.abc import Callable
from fractions import Fraction
from types import SimpleNamespace

import numpy as np
from timing import machine

from sdtrain.data.bucket import Buckets
from sdtrain.data.order import Order, permutation
from sdtrain.data.plan import BLOCK_SAMPLES, START, Layout, Plan
from sdtrain.ops.memory import peak_memory_bytes

_NUM_SAMPLES, _BATCH, _CELL, _NUM_BLOCKS = 100_000_000, 2048, 16, 8


def orders(num_samples: int, shard_samples: int, parts: tuple[float, ...] = (1.0,)) -> list[Order]:
    """Sources of a data set, by their parts of it."""
    bounds = [round(part * num_samples) for part in np.cumsum([0, *parts])]
    return [
        Order(f"source{k}", np.unique([*range(first, last, shard_samples), last]))
        for k, (first, last) in enumerate(zip(bounds, bounds[1:]))
    ]


def seconds_of(work: Callable[[], object], times: int = 3) -> float:
    """The least time on the processor, which other work on the machine does not count into."""
    found = []
    for _ in range(times):
        permutation.cache_clear()
        started = time.process_time()
        work()
        found.append(time.process_time() - started)
    return min(found)


def limit() -> float:
    """Seconds per million samples for two words each, sorted."""

    def draw() -> None:
        for key in range(2):
            np.random.Philox(key=key).random_raw(BLOCK_SAMPLES).sort()

    return seconds_of(draw) / BLOCK_SAMPLES * 1e6


def planning(plan: Plan) -> float:
    """Seconds per million planned samples, over some blocks."""

    def walk() -> None:
        carry = np.zeros((0, 2), np.int64)
        for block in range(_NUM_BLOCKS):
            _, carry = plan.block(block, carry)

    return seconds_of(walk) / (_NUM_BLOCKS * plan.pool_samples) * 1e6


def main() -> None:
    """Prints the table."""
    print(machine())
    side = np.random.default_rng(0).integers(512, 1000, (_NUM_SAMPLES, 2), np.int32)
    index, table = SimpleNamespace(side=side), Buckets().table(512)
    mixed = tuple(map(Fraction, ("0.7", "0.2", "0.1")))
    plans = {
        "one source, shards of 10,000": Plan(orders(_NUM_SAMPLES, 10_000), 0, _BATCH),
        "one source, shards of 1,000": Plan(orders(_NUM_SAMPLES, 1_000), 0, _BATCH),
        "three sources": Plan(orders(_NUM_SAMPLES, 10_000, (0.5, 0.3, 0.2)), 0, _BATCH, mixed),
        "aspect buckets": Plan(orders(_NUM_SAMPLES, 10_000), 0, _BATCH, layout=Layout(table, index, _CELL)),
    }
    least = limit()
    print(f"\n{'planning, s per million samples':40}{'ours':>8}{'limit':>8}")
    for name, plan in plans.items():
        print(f"{name:40}{planning(plan):8.3f}{least:8.3f}")
    print(f"\n{'from sample 50,000,000 of 100,000,000':40}{'s':>8}{'limit':>8}{'MiB':>8}   first batch's plan")
    for name, plan in plans.items():
        block, done = divmod(_NUM_SAMPLES // 2, plan.pool_samples)
        cursor = {**START, "step": _NUM_SAMPLES // 2 // _BATCH, "block": block, "step_in_block": done // _BATCH}
        taken = seconds_of(lambda plan=plan, cursor=cursor: next(plan.walk(cursor)))
        tracemalloc.start()
        next(plan.walk(cursor))
        peak = tracemalloc.get_traced_memory()[1] / 2**20
        tracemalloc.stop()
        print(f"{name:40}{taken:8.3f}{least * plan.pool_samples / 1e6:8.3f}{peak:8.0f}")
    print(f"\nbuckets of all, once at start {seconds_of(lambda: table.sort_out(side), 1):.1f} s")
    print(f"peak resident {peak_memory_bytes() / 2**20:.0f} MiB, of them sides 800")


if __name__ == "__main__":
    main()
