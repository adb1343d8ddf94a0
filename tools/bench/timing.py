"""Times two or more functions in turn (A B A B ...) in one process, and prints medians and the ratio to the last."""

from __future__ import annotations

import platform
import statistics
import time
from collections.abc import Callable, Mapping

import torch


def compare(functions: Mapping[str, Callable[[], object]], rounds: int = 9) -> dict[str, float]:
    """Median seconds by name; the last function is the peer that ratios are taken against."""
    times: dict[str, list[float]] = {name: [] for name in functions}
    for turn in range(rounds + 2):
        for name, function in functions.items():
            start = time.perf_counter()
            function()
            if turn >= 2:  # the first two warm up
                times[name].append(time.perf_counter() - start)
    medians = {name: statistics.median(found) for name, found in times.items()}
    peer = list(functions)[-1]
    for name, seconds in medians.items():
        print(f"  {name:44s} {seconds * 1e3:9.2f} ms   {medians[peer] / seconds:5.2f}x of the speed of {peer}")
    return medians


def machine() -> str:
    """What this ran on, in a line."""
    return f"{platform.processor() or platform.machine()}, {torch.get_num_threads()} threads, torch {torch.__version__}"


def matmul_peak(dtype: torch.dtype, size: int = 2048) -> float:
    """Measured FLOP/s of a square product."""
    a, b = (torch.randn(size, size).to(dtype) for _ in range(2))
    found = []
    for _ in range(9):
        start = time.perf_counter()
        a @ b
        found.append(time.perf_counter() - start)
    return 2 * size**3 / statistics.median(found)
