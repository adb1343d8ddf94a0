"""When checkpoints are saved: at optimizer-step boundaries, and old ones go only after the new one is committed."""

from __future__ import annotations

from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from typing_extensions import override

from sdtrain.callback.log import off_the_clock
from sdtrain.checkpoint.commit import prune
from sdtrain.errors import ConfigError


class Checkpoint(Callback):
    """Saves every `every_steps` optimizer steps and at the end; stands after all callbacks whose state it saves.

    The disk must hold `keep_last` + 1 checkpoints. The trainer needs `strategy.commit_io.CommitIO` as a plugin.
    """

    def __init__(self, every_steps: int, keep_last: int = 2) -> None:
        if every_steps < 1 or keep_last < 1:
            raise ConfigError(f"checkpoint: every_steps={every_steps} and keep_last={keep_last} must be at least 1")
        self.every_steps = every_steps
        self.keep_last = keep_last
        self._step = 0
        self._saved_step = -1

    def save(self, trainer: Trainer) -> None:
        """Commits this step, on all ranks together, unless it is already."""
        step = trainer.global_step
        if step == self._saved_step:
            return
        path = trainer.lightning_module.context.directory / "checkpoints" / f"step_{step:08d}"
        with off_the_clock(trainer):
            trainer.save_checkpoint(path)
            self._saved_step = step
            if trainer.is_global_zero:
                prune(path, self.keep_last)

    @override
    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        checkpoint["sdtrain"] = {
            "step": trainer.global_step,
            "images": pl_module.images_seen,
            "world_size": trainer.world_size,
            "config_hash": pl_module.context.config_hash,
            "data_fingerprint": pl_module.context.data_fingerprint,
        }

    @override
    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        self._saved_step = checkpoint["global_step"]

    @override
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._step = trainer.global_step

    @override
    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        step = trainer.global_step
        if step == self._step:  # gradients are still being accumulated
            return
        self._step = step
        # The last step is saved here, not in on_train_end: there Lightning has closed the epoch, and what is saved
        # would differ from what a longer run saves at this step.
        if step % self.every_steps == 0 or step == trainer.max_steps or trainer.should_stop:
            self.save(trainer)

    @override
    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.save(trainer)
