"""When checkpoints are saved: at optimizer-step boundaries, and old ones go only after the new one is committed."""

from __future__ import annotations

import math
from collections.abc import Mapping
from functools import partial
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from typing_extensions import override

from sdtrain.callback.evaluate import Evaluate
from sdtrain.callback.log import off_the_clock
from sdtrain.checkpoint import pieces
from sdtrain.checkpoint.commit import prune
from sdtrain.errors import ConfigError


class Checkpoint(Callback):
    """Saves every `every_steps` optimizer steps and at the end; stands after all callbacks whose state it saves.

    The disk must hold one checkpoint more than are kept. The trainer needs `strategy.commit_io.CommitIO` as a plugin.

    Args:
        keep_last: how many of the newest stay.
        keep_every_steps: checkpoints of multiples of this stay, too; null for none.
        keep_best: {metric: val/loss, mode: min} keeps the best of those that were evaluated at their step; null for
            none.
        in_background: writes while training goes on, where one process holds all there is to save (not DeepSpeed).
    """

    def __init__(
        self,
        every_steps: int,
        keep_last: int = 2,
        keep_every_steps: int | None = None,
        keep_best: Mapping[str, str] | None = None,
        in_background: bool = False,
    ) -> None:
        if every_steps < 1 or keep_last < 1:
            raise ConfigError(f"checkpoint: every_steps={every_steps} and keep_last={keep_last} must be at least 1")
        if keep_every_steps is not None and (keep_every_steps < 1 or keep_every_steps % every_steps):
            raise ConfigError(
                f"checkpoint.keep_every_steps={keep_every_steps} must be a multiple of every_steps={every_steps}"
            )
        best = dict(keep_best or {"metric": "", "mode": "min"})
        if best.keys() != {"metric", "mode"} or best["mode"] not in ("min", "max"):
            raise ConfigError(f"checkpoint.keep_best={keep_best}: write {{metric: val/loss, mode: min}}, or max")
        self.every_steps, self.in_background = every_steps, in_background
        self.metric = best["metric"]
        self._prune = partial(prune, keep_last=keep_last, keep_every_steps=keep_every_steps, best=best["mode"])
        self._step = 0
        self._saved_step = -1
        self._missing = ""  # what is told once the step is saved: nothing is lost by it
        self._restored: dict[str, Any] | None = None

    def save(self, trainer: Trainer, in_background: bool = False) -> None:
        """Commits this step, on all ranks together, unless it is already."""
        step = trainer.global_step
        with off_the_clock(trainer, "save"):
            if step != self._saved_step:
                path = trainer.lightning_module.context.directory / "checkpoints" / f"step_{step:08d}"
                self._tell(trainer, trainer.strategy.checkpoint_io.wait())
                trainer.save_checkpoint(path, storage_options={"prune": self._prune, "in_background": in_background})
                self._saved_step = step
                if self._missing:
                    raise ConfigError(self._missing)
            if not in_background:
                self._tell(trainer, trainer.strategy.checkpoint_io.wait())

    def _tell(self, trainer: Trainer, saved: Any) -> None:  # noqa: ANN401 the plugin's
        if saved is not None:
            row = {"bytes": saved.num_bytes, "stall_seconds": saved.stall_seconds, "seconds": saved.seconds}
            context = trainer.lightning_module.context
            context.tracker.log({"stage": context.stage, "step": saved.step, "event": "checkpoint", **row})

    @override
    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        checkpoint["sdtrain"] = {
            "step": trainer.global_step,
            "images": pl_module.images_seen,
            "world_size": trainer.world_size,
            "config_hash": pl_module.context.config_hash,
            "data_fingerprint": pl_module.context.data_fingerprint,
            "score": self._score(trainer),
        }
        if trainer.optimizers and not hasattr(trainer.strategy, "shards"):
            states = zip(trainer.optimizers, checkpoint["optimizer_states"])
            checkpoint["optimizer_states"] = [pieces.by_name(s, [*dict(_named(pl_module, o))]) for o, s in states]

    @override
    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        self._saved_step, self._restored = checkpoint["global_step"], checkpoint
        # Lightning steps where its count of micro-batches is a multiple of those of a step, which may be others now.
        count = checkpoint["loops"]["fit_loop"]["epoch_loop.batch_progress"]["current"]
        num_missing = -count["ready"] % trainer.accumulate_grad_batches
        count.update({name: number + num_missing for name, number in count.items()})

    @override
    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """There are optimizers now, and Lightning is about to restore them."""
        checkpoint, self._restored = self._restored, None
        if checkpoint is not None and not hasattr(trainer.strategy, "shards"):
            states = zip(trainer.optimizers, checkpoint["optimizer_states"])
            checkpoint["optimizer_states"] = [
                pieces.by_number(s, o.state_dict(), _named(pl_module, o)) for o, s in states
            ]

    def _score(self, trainer: Trainer) -> float | None:
        """The metric that `keep_best` names, where it was measured at this step, and is a number."""
        evaluations = [c for c in trainer.callbacks if isinstance(c, Evaluate) and c.last_step == trainer.global_step]
        found = [c.last_figures[self.metric] for c in evaluations if self.metric in c.last_figures]
        if self.metric and evaluations and not found:
            known = ", ".join(evaluations[0].last_figures)
            self._missing = f"checkpoint.keep_best.metric={self.metric} is not measured here; there are {known}"
        return found[0] if found and math.isfinite(found[0]) else None

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
        self._tell(trainer, trainer.strategy.checkpoint_io.poll())
        # The last step is saved here, not in on_train_end: there Lightning has closed the epoch, and what is saved
        # would differ from what a longer run saves at this step.
        is_last = step == trainer.max_steps or trainer.should_stop
        if step % self.every_steps == 0 or is_last:
            self.save(trainer, in_background=self.in_background and not is_last)

    @override
    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.save(trainer)


def _named(module: LightningModule, optimizer: Any) -> list[tuple[str, Any]]:  # noqa: ANN401 Lightning's or torch's
    """Its parameters with their names, in the order that its state counts them."""
    names = {id(p): name for name, p in module.named_parameters()}
    return [(names[id(p)], p) for group in optimizer.param_groups for p in group["params"]]
