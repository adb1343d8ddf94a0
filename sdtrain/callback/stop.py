"""The stop bus: signals, a time limit and a STOP file end the fit at the next step boundary, on all ranks together."""

from __future__ import annotations

import os
import shlex
import signal
import sys
import threading
import time
from types import FrameType
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from typing_extensions import override

from sdtrain.callback.checkpoint import Checkpoint
from sdtrain.errors import RunError

_STARTED = time.monotonic()  # about when the process did: a time limit counts over all its stages


class Stop(Callback):
    """SIGTERM, SIGUSR1, Ctrl-C, the time limit or `touch DIR/STOP`: saves, and leaves with exit code 75.

    Its handlers only set a flag (Lightning's own broadcasts inside the handler, and hangs). They replace Lightning's
    when training starts; Lightning puts back every handler it found when the fit ends. A second Ctrl-C leaves at once.
    """

    def __init__(self, time_limit_seconds: float | None = None) -> None:
        self.time_limit_seconds = time_limit_seconds
        self._reason = ""
        self._num_interrupts = 0
        self._step = 0
        self._next_look_seconds = 0.0

    @override
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._step = trainer.global_step
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT):
                signal.signal(number, self._handle)

    @override
    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if trainer.global_step != self._step:
            self._step = trainer.global_step
            self._stop_if_asked(trainer)

    @override
    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._stop_if_asked(trainer)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if number == signal.SIGINT:
            self._num_interrupts += 1
            if self._num_interrupts > 1:
                signal.default_int_handler(number, frame)
            # not print: a handler may interrupt one
            os.write(2, b"\nstopping at the end of this step, then saving; Ctrl-C again leaves at once\n")
        self._reason = self._reason or signal.Signals(number).name

    def _look(self, trainer: Trainer) -> None:
        now = time.monotonic()
        if self.time_limit_seconds is not None and now - _STARTED >= self.time_limit_seconds:
            self._reason = self._reason or "the time limit"
        if trainer.is_global_zero and now >= self._next_look_seconds:
            self._next_look_seconds = now + 1
            if (trainer.lightning_module.context.run_directory / "STOP").exists():
                self._reason = self._reason or "the STOP file"

    def _stop_if_asked(self, trainer: Trainer) -> None:
        self._look(trainer)
        if not trainer.strategy.reduce_boolean_decision(bool(self._reason), all=False):
            return
        for callback in trainer.callbacks:
            if isinstance(callback, Checkpoint):
                callback.save(trainer)
        module, reason = trainer.lightning_module, self._reason or "another rank"
        if trainer.is_global_zero:
            (module.context.run_directory / "STOP").unlink(missing_ok=True)
        place = {"stage": module.context.stage, "step": trainer.global_step, "images": module.images_seen}
        module.context.tracker.log({**place, "event": "stop", "reason": reason})
        command = shlex.join(sys.orig_argv)
        raise RunError(f"stopped by {reason} at step {trainer.global_step}; continue with: {command}", 75)
