"""When a callback acts: after every N optimizer steps, and after the last one."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from typing_extensions import override

from sdtrain.errors import ConfigError


class EverySteps(Callback, ABC):
    """Calls `act` once after every `every_steps` optimizer steps and once after step `max_steps`, on all ranks.

    A run that is stopped before its last step does not act on the way out: who preempts it does not wait.
    """

    def __init__(self, every_steps: int) -> None:
        if every_steps < 1:
            raise ConfigError(f"{type(self).__name__.lower()}.every_steps={every_steps} must be 1 or more")
        self.every_steps = every_steps
        self._seen_step = 0

    @override
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._seen_step = trainer.global_step

    @override
    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        step = trainer.global_step
        if step == self._seen_step:  # a micro-batch inside a step that is not done
            return
        self._seen_step = step
        if step % self.every_steps == 0 or step == trainer.max_steps:
            self.act(trainer, pl_module)

    def warn(self, trainer: Trainer, pl_module: LightningModule, line: str) -> None:
        """On the terminal, and as an event of the run. For the rank that writes rows."""
        context = pl_module.context
        print(f"warning: {context.stage}: {line}", flush=True)
        place = {"stage": context.stage, "step": trainer.global_step}
        context.tracker.log({**place, "event": "warning", "warning": f"{context.stage}: {line}"})

    @abstractmethod
    def act(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """What is done then."""
