"""A heartbeat a rank, and a thread that ends a run which stands still, with the stacks of all ranks and the culprit."""

from __future__ import annotations

import faulthandler
import multiprocessing
import os
import signal
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from typing import Any, NoReturn

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from typing_extensions import override

from sdtrain.callback import ending
from sdtrain.callback.ending import read_json, write_json
from sdtrain.errors import ConfigError, RunError

PHASES = ("next batch", "forward", "backward", "optimizer")  # of a step, in their order
HANG = 77


class Watchdog(Callback):
    """DIR/heartbeat/rank*.json says where each rank stands; a rank that makes no step in time ends the run with 77.

    DIR/logs/rank*.stacks.txt then holds the stacks of all threads of each rank that still could write them. A rank that
    ended alone also ends the others, which would wait for it in a collective.

    Args:
        timeout_seconds: of a part of a step.
        slow_timeout_seconds: of what takes longer: the first step with its compilation, figures, previews, saves.
    """

    def __init__(self, timeout_seconds: float = 600.0, slow_timeout_seconds: float = 3600.0) -> None:
        if not 0 < timeout_seconds <= slow_timeout_seconds:
            raise ConfigError(
                f"watchdog.timeout_seconds={timeout_seconds} must be above 0 and at most slow_timeout_seconds="
                f"{slow_timeout_seconds}"
            )
        self.timeout_seconds = timeout_seconds
        self.slow_timeout_seconds = slow_timeout_seconds
        self._look_seconds = min(1.0, timeout_seconds / 10)
        self._is_warm = False
        self._place = ("start", 0, slow_timeout_seconds)
        self._stood_seconds = 0.0
        self._ended = threading.Event()
        self._thread: threading.Thread | None = None

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """What is done inside is no part of a step, and may take longer."""
        before, step, _ = self._place
        self._enter(name, step, self.slow_timeout_seconds)
        try:
            yield
        finally:
            self._step(before, step)

    @override
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self._directory = pl_module.context.run_directory
        self._rank, self._world_size = trainer.global_rank, trainer.world_size
        self._enter("start", trainer.global_step, self.slow_timeout_seconds)
        self._is_warm = False
        self._ended.clear()
        self._beat()
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)
        self._thread.start()

    @override
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._step("next batch", trainer.global_step)

    @override
    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        self._step("forward", trainer.global_step)

    @override
    def on_before_backward(self, trainer: Trainer, pl_module: LightningModule, loss: torch.Tensor) -> None:
        self._step("backward", trainer.global_step)

    @override
    def on_before_optimizer_step(
        self, trainer: Trainer, pl_module: LightningModule, optimizer: torch.optim.Optimizer
    ) -> None:
        self._step("optimizer", trainer.global_step)

    @override
    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self._is_warm = self._is_warm or self._place[1] != trainer.global_step
        self._step("next batch", trainer.global_step)

    @override
    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self._end()

    @override
    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        self._end()

    def _step(self, phase: str, step: int) -> None:
        self._enter(phase, step, self.timeout_seconds if self._is_warm else self.slow_timeout_seconds)

    def _enter(self, phase: str, step: int, limit_seconds: float) -> None:
        self._place = (phase, step, limit_seconds)  # in one go: the thread reads it

    def _end(self) -> None:
        self._enter("ended", self._place[1], self.slow_timeout_seconds)
        self._ended.set()
        if self._thread is not None and self._thread is not threading.current_thread():
            self._thread.join(timeout=2 * self._look_seconds)
            self._beat()

    def _watch(self) -> None:
        hang, place, awake = self._directory / "heartbeat" / "hang.json", self._place, time.monotonic()
        while not self._ended.wait(self._look_seconds):
            now = time.monotonic()
            # Not the clock's time: a process that was stopped with Ctrl-Z and goes on does not hang.
            stood = min(now - awake, 2 * self._look_seconds)
            self._stood_seconds = self._stood_seconds + stood if self._place is place else 0.0
            place, awake = self._place, now
            is_late = self._stood_seconds > place[2]
            if is_late or now - self._beaten >= 5 * self._look_seconds:
                self._beat()
            if is_late and not hang.exists():
                write_json(hang, {"reason": self._blame(*place)})
            if (found := read_json(hang)) is not None:
                self._leave(RunError(found["reason"], HANG))
            other = ending.told_by_another(self._directory) if self._rank == 0 else ending.told(self._directory)
            # in good order it leaves by itself, a moment later
            if other is not None and not self._ended.wait(ending.GRACE_SECONDS / 2):
                self._leave(other)

    def _beat(self) -> None:
        (phase, step, _), self._beaten = self._place, time.monotonic()
        content = {"step": step, "phase": phase, "seconds": round(self._stood_seconds, 1), "time": time.time()}
        with suppress(OSError):  # a full disk is the checkpoints' to tell
            write_json(self._directory / "heartbeat" / f"rank{self._rank}.json", content)

    def _blame(self, phase: str, step: int, limit_seconds: float) -> str:
        beats = {
            rank: read_json(self._directory / "heartbeat" / f"rank{rank}.json") for rank in range(self._world_size)
        }
        oldest = time.time() - max(limit_seconds / 2, 7 * self._look_seconds)
        where = "; ".join(f"rank {rank} {_where(beats[rank], oldest)}" for rank in culprits(beats, oldest)[:8])
        here = f"rank {self._rank} has made no progress for {limit_seconds:g} s, {phase} of step {step + 1}"
        stacks = f"the stacks are in {self._directory / 'logs'}/rank*.stacks.txt"
        return f"hang: {where or 'all ranks stand at the same place'}; {here}; {stacks}"

    def _leave(self, why: RunError) -> NoReturn:
        """Ends this process, whose main thread may never come back, from this one."""
        if why.exit_code == HANG:
            path = self._directory / "logs" / f"rank{self._rank}.stacks.txt"
            path.parent.mkdir(exist_ok=True)
            with path.open("w") as file:
                faulthandler.dump_traceback(file, all_threads=True)
        if self._rank == 0:
            ending.tell(self._directory, why.exit_code, str(why).splitlines()[0])
            print(f"error: {why}", file=sys.stderr, flush=True)
            ending.outlive_children(ending.GRACE_SECONDS)
            _exit(why.exit_code)
        if ending.wait_until(lambda: ending.told(self._directory), 2 * ending.GRACE_SECONDS):
            _exit(0)
        ending.tell(self._directory, why.exit_code, f"rank {self._rank}: {why}")
        if ending.is_launched_by_lightning():  # by the first rank, which may be stopped and is not looked after
            os.kill(os.getppid(), signal.SIGKILL)
        _exit(why.exit_code)


def _exit(code: int) -> NoReturn:
    for worker in multiprocessing.active_children():
        worker.kill()  # one that is stopped would not notice that its parent is gone
    os._exit(code)


def culprits(beats: Mapping[int, Mapping[str, Any] | None], oldest: float) -> list[int]:
    """The ranks that hold up the others: those not heard of since `oldest`, or else those that stand where fewest do.

    Of two equal halves it is the one that went a step ahead, past a collective that the others wait in, or else the one
    that is behind within the step.
    """
    silent = [rank for rank, beat in beats.items() if beat is None or beat["time"] < oldest]
    if silent:
        return silent
    places = {rank: (beat["step"], beat["phase"]) for rank, beat in beats.items() if beat is not None}
    counts = Counter(places.values())
    if len(counts) == 1:
        return []
    fewest = [place for place, count in counts.items() if count == min(counts.values())]
    last_step = max(step for step, _ in fewest)
    order = {phase: number for number, phase in enumerate(PHASES)}
    blamed = min((p for p in fewest if p[0] == last_step), key=lambda p: order.get(p[1], len(order)))
    return [rank for rank, place in places.items() if place == blamed]


def _where(beat: Mapping[str, Any] | None, oldest: float) -> str:
    if beat is None:
        return "was never heard of"
    place = f"{beat['phase']} of step {beat['step'] + 1}"
    return (
        f"({place})" if beat["time"] >= oldest else f"(last heard of {time.time() - beat['time']:.0f} s ago, {place})"
    )
