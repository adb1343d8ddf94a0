"""Times two or more functions in turn (A B A B ...), and prints medians and the ratio to the last."""

from __future__ import annotations

import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

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


class Contestant:
    """A function in a process of its own: how memory is kept and denormals are taken is settled once a process."""

    def __init__(self, arguments: Sequence[str], python: str = sys.executable) -> None:
        command = [python, *arguments]
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self._answer()  # it has loaded: no first step is timed with the imports in it

    def __call__(self) -> None:
        self._ask("step")

    def end(self) -> float:
        """Ends the process; the most memory it held, or that its accelerator did, in GiB."""
        return float(self._ask("end"))

    def _ask(self, word: str) -> str:
        self.process.stdin.write(f"{word}\n")
        self.process.stdin.flush()
        return self._answer()

    def _answer(self) -> str:
        answer = self.process.stdout.readline()
        if not answer:
            raise SystemExit(f"{' '.join(self.process.args)} ended with {self.process.wait()}")
        return answer


def serve(step: Callable[[], object]) -> None:
    """What a Contestant's process does: a step when it is told to, and its memory at the end."""
    print("ready", flush=True)
    for line in sys.stdin:
        if line.strip() == "end":
            break
        step()
        print("done", flush=True)
    if torch.cuda.is_available():
        print(torch.cuda.max_memory_allocated() / 2**30)
    else:  # getrusage would give a child the parent's peak
        lines = Path("/proc/self/status").read_text().splitlines()
        print(int(next(line for line in lines if line.startswith("VmHWM")).split()[1]) / 2**20)


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
