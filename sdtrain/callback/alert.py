"""Alerts: a loss that jumps, a run that stands still or waits for its data. Each is a line, an event, and a message of
W&B's.
"""

from __future__ import annotations

import math
import os
import statistics
import sys
import threading
import time
from collections import deque
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from typing_extensions import override

from sdtrain.callback.ending import read_json
from sdtrain.callback.log import Log
from sdtrain.callback.watchdog import PHASES, culprits
from sdtrain.errors import ConfigError

_LEAST_ROWS = 20  # of which a usual loss is told; of a usual interval, 3
_LEAST_SPREAD = 0.01  # of the median: a loss that hardly moves has no spikes of less than a few per cent
_LOOK_SECONDS = 1.0


class Alert(Callback):
    """Looks at the rows that `Log` has written, which are numbers on the host already: nothing waits for the device.

    A loss, the figure `key` of a row, that rises above the median of the last rows by `num_deviations` robust standard
    deviations (1.4826 times the median absolute deviation) is told once, until it comes back or stays so long that it
    is usual. So is a stall: no row for `stall_factor` times the usual interval, evaluation, samples and saves left out,
    as the heartbeats of `Watchdog` say; a run without them has no such alerts. So are data that the first rank spends
    most of its time to get: who has left `data.num_workers` at 0 pays for a device that idles.

    Args:
        key: "loss", or a term of it where the whole jumps for a reason of its own, as when stage 1's adversary begins.
        window_rows: how many rows are looked back at.
        num_deviations: above which a loss is a spike.
        stall_factor: of the usual time between two rows.
        least_stall_seconds: what is no stall yet, however fast rows come.
        most_waiting: the share of its time, in the middle of the last rows, that a process may wait for batches.
    """

    def __init__(
        self,
        key: str = "loss",
        window_rows: int = 50,
        num_deviations: float = 6.0,
        stall_factor: float = 10.0,
        least_stall_seconds: float = 60.0,
        most_waiting: float = 0.5,
    ) -> None:
        if window_rows < _LEAST_ROWS:
            raise ConfigError(f"alert.window_rows={window_rows} must be {_LEAST_ROWS} or more")
        if num_deviations <= 0 or stall_factor <= 1:
            raise ConfigError(
                f"alert.num_deviations={num_deviations} must be above 0, and stall_factor={stall_factor} above 1"
            )
        self.key, self.num_deviations, self.stall_factor = key, num_deviations, stall_factor
        self.least_stall_seconds, self.most_waiting = least_stall_seconds, most_waiting
        self._losses: deque[float] = deque(maxlen=window_rows)
        self._seconds: deque[float] = deque(maxlen=window_rows)  # between two rows
        self._waits: deque[float] = deque(maxlen=_LEAST_ROWS)
        self._row: dict[str, Any] = {}
        self._is_spike = self._is_waiting = False
        self._ended = threading.Event()
        self._thread: threading.Thread | None = None

    @override
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._row = {"step": trainer.global_step}
        self._seconds.clear(), self._waits.clear()
        if trainer.is_global_zero:
            self._ended.clear()
            arguments = (pl_module.context, trainer.world_size)
            self._thread = threading.Thread(target=self._watch, args=arguments, name="alert", daemon=True)
            self._thread.start()

    @override
    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        row = next((callback.last_row for callback in trainer.callbacks if isinstance(callback, Log)), None)
        if row is None or row is self._row:
            return
        if "loss" in row and self.key not in row:
            raise ConfigError(f"alert.key={self.key} is not in the rows of {row['stage']}: {', '.join(row)}")
        self._seconds.append(row["step_seconds"] * (row["step"] - self._row["step"]))
        self._row = row
        if math.isfinite(row.get(self.key, math.nan)) and trainer.is_global_zero:  # the guard tells of the others
            self._look_at(row, pl_module.context)
        if trainer.is_global_zero:
            self._look_at_data(row, pl_module.context, getattr(trainer.datamodule, "num_workers", 0))

    @override
    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._end()

    @override
    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        self._end()

    @override
    def state_dict(self) -> dict[str, Any]:
        return {"losses": list(self._losses), "is_spike": self._is_spike}

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._losses.clear()
        self._losses.extend(state_dict["losses"])
        self._is_spike = state_dict["is_spike"]

    def _look_at(self, row: dict[str, Any], context: Any) -> None:  # noqa: ANN401 a Context
        loss, found = row[self.key], deviations(row[self.key], list(self._losses))
        if found > self.num_deviations and not self._is_spike:
            self._is_spike = True
            usual = statistics.median(self._losses)
            above = f"{found:.0f} deviations above the median {usual:.4g} of the {len(self._losses)} rows before"
            text = f"{self.key} is {loss:.4g} at step {row['step']}, {above}"
            figures = {"value": loss, "median": usual, "deviations": round(found, 2)}
            _tell(context, row["step"], "loss spike", text, figures)
        elif found < self.num_deviations / 2:
            self._is_spike = False
        self._losses.append(loss)

    def _look_at_data(self, row: dict[str, Any], context: Any, num_workers: int) -> None:  # noqa: ANN401
        self._waits.append(row["data_wait_fraction"])
        share = statistics.median(self._waits)
        if len(self._waits) == self._waits.maxlen and share > self.most_waiting and not self._is_waiting:
            self._is_waiting = True
            text = f"{share:.0%} of the last rows' time until step {row['step']} went by waiting for data: raise "
            text += f"data.num_workers, which is {num_workers} on a node of {os.cpu_count()} cores"
            _tell(context, row["step"], "waits for data", text, {"data_wait_fraction": share})
        elif share < self.most_waiting / 2:
            self._is_waiting = False

    def _watch(self, context: Any, world_size: int) -> None:  # noqa: ANN401
        """Not by the clock: a process that was stopped with Ctrl-Z and goes on has not stood still."""
        stood, row, awake, is_told = 0.0, self._row, time.monotonic(), False
        while not self._ended.wait(_LOOK_SECONDS):
            now = time.monotonic()
            beat = read_json(context.run_directory / "heartbeat" / "rank0.json")
            if row is not self._row:
                stood, row, is_told = 0.0, self._row, False
            elif beat is not None and beat["phase"] in PHASES:
                stood += min(now - awake, 2 * _LOOK_SECONDS)
            awake = now
            if len(self._seconds) < 3 or is_told:
                continue
            usual = statistics.median(self._seconds)
            if stood > max(self.stall_factor * usual, self.least_stall_seconds):
                is_told = True
                text = f"no row for {stood:.0f} s after step {row['step']}, where {usual:.3g} s are usual: "
                text += _where(context.run_directory / "heartbeat", world_size)
                _tell(context, row["step"], "stall", text, {"seconds_without": round(stood, 1), "usual_seconds": usual})

    def _end(self) -> None:
        self._ended.set()
        if self._thread is not None:
            self._thread.join(timeout=2 * _LOOK_SECONDS)


def deviations(value: float, before: list[float]) -> float:
    """How far a value is above the median of those before it, in robust standard deviations; 0 where those are few."""
    if len(before) < _LEAST_ROWS:
        return 0.0
    median = statistics.median(before)
    spread = 1.4826 * statistics.median([abs(other - median) for other in before])
    return (value - median) / max(spread, _LEAST_SPREAD * abs(median), 1e-12)


def _where(heartbeats: Any, world_size: int) -> str:  # noqa: ANN401 a Path
    """What the ranks are at, by their heartbeats; where there are several, whom the others wait for."""
    beats = {rank: read_json(heartbeats / f"rank{rank}.json") for rank in range(world_size)}
    late = culprits(beats, time.time() - 30) or [0]
    told = [f"rank {rank} is at {beat['phase']} of step {beat['step'] + 1}" for rank in late if (beat := beats[rank])]
    return ", ".join(told[:8]) or f"rank {late[0]} is not heard of"


def _tell(context: Any, step: int, title: str, text: str, figures: dict[str, Any]) -> None:  # noqa: ANN401
    print(f"alert: {context.stage}: {text}", file=sys.stderr, flush=True)
    place = {"event": "alert", "stage": context.stage, "step": step}
    context.tracker.log({**place, "title": f"{context.stage}: {title}", "text": text, **figures})
