"""The stop bus: signals, a time limit and a STOP file end the fit at the next step boundary, on all ranks together."""

from __future__ import annotations

import os
import signal
import threading
import time
from types import FrameType
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from typing_extensions import override

from sdtrain.callback.agreement import Agreement
from sdtrain.callback.checkpoint import Checkpoint
from sdtrain.callback.ending import REASONS, SIGNALS, leave_marker, next_command
from sdtrain.errors import RunError

_STARTED = time.monotonic()  # about when the process did: a time limit counts over all its stages


class Stop(Callback):
    """SIGTERM, SIGUSR1, Ctrl-C, the time limit or `touch DIR/STOP`: saves, and leaves with exit code 75.

    Its handlers only set a flag (Lightning's own broadcasts inside the handler, and hangs), and only in the process
    that trains: a forked worker inherits them. The ranks agree one step late, so that no step waits for it. A second
    Ctrl-C leaves at once.
    """

    def __init__(self, time_limit_seconds: float | None = None) -> None:
        self.time_limit_seconds = time_limit_seconds
        self._asked = 0  # a place in REASONS
        self._num_interrupts = 0
        self._step = 0
        self._next_look_seconds = 0.0
        self._agreement: Agreement | None = None
        self._handlers_before: dict[int, Any] = {}
        self._process = os.getpid()

    @override
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._step, self._process = trainer.global_step, os.getpid()
        self._agreement = Agreement(trainer)
        if threading.current_thread() is threading.main_thread():
            self._handlers_before = {number: signal.signal(number, self._handle) for number in SIGNALS}

    @override
    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if trainer.global_step != self._step:
            self._step = trainer.global_step
            self._look(trainer)
            self._stop_if(trainer, self._agreement.late(self._asked))

    @override
    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._look(trainer)
        self._stop_if(trainer, self._agreement.now(self._asked))
        self._put_back()

    @override
    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        if not self._asked:  # a run that is told to stop is often told twice
            self._put_back()

    def _put_back(self) -> None:
        for number, handler in self._handlers_before.items():
            signal.signal(number, handler)
        self._handlers_before = {}

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if os.getpid() != self._process:
            return
        if number == signal.SIGINT:
            self._num_interrupts += 1
            if self._num_interrupts > 1:
                signal.default_int_handler(number, frame)
            # not print: a handler may interrupt one
            os.write(2, b"\nstopping at the end of this step, then saving; Ctrl-C again leaves at once\n")
        self._ask(signal.Signals(number).name)

    def _ask(self, reason: str) -> None:
        self._asked = max(self._asked, REASONS.index(reason))

    def _look(self, trainer: Trainer) -> None:
        now = time.monotonic()
        if self.time_limit_seconds is not None and now - _STARTED >= self.time_limit_seconds:
            self._ask("the time limit")
        if trainer.is_global_zero and now >= self._next_look_seconds:
            self._next_look_seconds = now + 1
            if (trainer.lightning_module.context.run_directory / "STOP").exists():
                self._ask("the STOP file")

    def _stop_if(self, trainer: Trainer, asked: int) -> None:
        if not asked:
            return
        for callback in trainer.callbacks:
            if isinstance(callback, Checkpoint):
                callback.save(trainer)
        module, reason = trainer.lightning_module, REASONS[asked]
        if trainer.is_global_zero:
            (module.context.run_directory / "STOP").unlink(missing_ok=True)
            leave_marker(module.context.run_directory, reason)
        place = {"stage": module.context.stage, "step": trainer.global_step, "images": module.images_seen}
        module.context.tracker.log({**place, "event": "stop", "reason": reason})
        raise RunError(f"stopped by {reason} at step {trainer.global_step}; continue with: {next_command()}", 75)
