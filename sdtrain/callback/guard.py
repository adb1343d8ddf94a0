"""The non-finite guard: no loss or gradient that is not a number reaches a checkpoint, and what is done about it."""

from __future__ import annotations

import json
import math
from collections import deque
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor
from typing_extensions import override

from sdtrain.callback.agreement import Agreement
from sdtrain.contracts import Batch
from sdtrain.errors import ConfigError, RunError
from sdtrain.ops.norm import total_norm

NONFINITE = 76
_NUM_NOTES = 3  # the step that just ended, the one whose note is read now, the one that the ranks answer about now


class Rollback(RunError):
    """The fit is to begin again from its newest checkpoint; the samples since then are passed over."""


class Note(NamedTuple):
    """What became of a step: losses and norms by name, which the device writes and the host reads a step later."""

    step: int
    names: list[str]
    values: Tensor
    is_written: torch.cuda.Event | None
    sample_ids: list[Tensor]

    def bad(self) -> str:
        """The name of the first value that is not finite, or nothing."""
        if self.is_written is not None:
            self.is_written.synchronize()
        return next((name for name, value in zip(self.names, self.values.tolist()) if not math.isfinite(value)), "")


class Guard(Callback):
    """Looks whether each loss and gradient is finite, and never lets weights be saved that are not.

    The device notes it and the host reads the note a step late, so nothing waits; the ranks decide together. What was
    found, with the samples of all ranks, is a line of DIR/nonfinite.jsonl.

    Args:
        on_nonfinite: "stop" ends the run with 76. "rollback" goes back to the newest checkpoint and passes over the
            samples since then. "skip" leaves the step out: weights, optimizer, averages and schedule are as they were,
            and the step counts only as one of max_steps. The host then waits for every step's gradients.
        most_in_a_row: more steps skipped one after the other, or rollbacks to one checkpoint, end the run too.
    """

    def __init__(self, on_nonfinite: Literal["stop", "skip", "rollback"] = "stop", most_in_a_row: int = 5) -> None:
        if on_nonfinite not in ("stop", "skip", "rollback"):
            raise ConfigError(f"guard.on_nonfinite is stop, skip or rollback, not {on_nonfinite!r}")
        if most_in_a_row < 1:
            raise ConfigError(f"guard.most_in_a_row={most_in_a_row} must be at least 1")
        self.on_nonfinite, self.most_in_a_row = on_nonfinite, most_in_a_row
        self._notes: deque[Note] = deque(maxlen=_NUM_NOTES)
        self._values: list[tuple[str, Tensor]] = []  # of this step so far, on the device
        self._sample_ids: list[Tensor] = []
        self._num_in_a_row = 0
        self._data_state: dict[str, Any] | None = None  # at the newest checkpoint
        self._cursor: dict[str, Any] = {}

    @override
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._step = trainer.global_step
        self._agreement = Agreement(trainer)

    @override
    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Batch, batch_idx: int) -> None:
        self._sample_ids.append(batch["sample_id"])

    @override
    def on_before_backward(self, trainer: Trainer, pl_module: LightningModule, loss: Tensor) -> None:
        self._values.append(("loss", loss.detach()))

    @override
    def on_before_optimizer_step(
        self, trainer: Trainer, pl_module: LightningModule, optimizer: torch.optim.Optimizer
    ) -> None:
        if self.on_nonfinite == "skip" and pl_module.is_last_micro:  # DeepSpeed asks at every micro-batch
            if not _has_scaler(trainer):
                self._values.append(("gradient", _gradient_norm(trainer)))
            pl_module.is_left_out = self._is_to_skip(trainer)

    @override
    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Batch, batch_idx: int
    ) -> None:
        if trainer.global_step == self._step:
            return
        self._step, self._cursor = trainer.global_step, batch.get("cursor", {})
        if self.on_nonfinite != "skip":  # which has looked already
            if not _has_scaler(trainer):
                self._values += [(f"gradient of {part}", norm) for part, norm in pl_module.gradient_norms.items()]
            self._notes.append(self._note(trainer.global_step))
            is_bad = len(self._notes) > 1 and self._notes[-2].bad()
            if self._agreement.late(bool(is_bad)):
                self._end(trainer)
        self._values, self._sample_ids = [], []

    @override
    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        named = [(name, p) for name, p in pl_module.named_parameters() if p.numel()]
        flags = torch.stack([~p.detach().isfinite().all() for _, p in named]).tolist() if named else []
        bad = next((f"parameter {name}" for (name, _), is_bad in zip(named, flags) if is_bad), "")
        # ZeRO-3 leaves such a step out by itself: its weights are finite, and the note is not read yet.
        if self._agreement.now(bool(bad) or any(note.bad() for note in self._notes)):
            self._end(trainer, bad)
        self._data_state = _data_state(trainer)
        if self.on_nonfinite == "rollback":
            self._num_in_a_row = 0

    @override
    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Passes over the samples that made earlier attempts go back to this checkpoint."""
        passed = _read_rollbacks(_rollback_file(trainer))
        while (found := passed.pop(_key(_data_state(trainer)), None)) is not None:
            trainer.datamodule.advance(found)
            self._num_in_a_row += 1
        self._data_state = _data_state(trainer)

    @override
    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """No step comes in which the last notes would be read."""
        if self._agreement.now(any(note.bad() for note in self._notes)):
            self._end(trainer)

    def _note(self, step: int) -> Note:
        names, values = zip(*self._values)
        values, is_written = torch.stack([value.float() for value in values]), None
        if values.device.type == "cuda":
            values, is_written = values.to("cpu", non_blocking=True), torch.cuda.Event()
            is_written.record()
        return Note(step, list(names), values, is_written, self._sample_ids)

    def _is_to_skip(self, trainer: Trainer) -> bool:
        bad = self._note(trainer.global_step + 1).bad()
        if not self._agreement.now(bool(bad)):
            self._num_in_a_row = 0
            return False
        self._num_in_a_row += 1
        step, what, path = self._report(trainer, [(trainer.global_step + 1, bad, self._sample_ids)])
        if self._num_in_a_row > self.most_in_a_row:
            raise self._stop(f"{what} at step {step}, and {self.most_in_a_row} steps before it were skipped", path)
        return True

    def _end(self, trainer: Trainer, parameter: str = "") -> None:
        """On all ranks together: never returns."""
        notes = [(note.step, note.bad(), note.sample_ids) for note in self._notes]
        if parameter:
            notes.append((trainer.global_step, parameter, []))
        step, what, path = self._report(trainer, notes)
        if self.on_nonfinite != "rollback" or self._data_state is None:
            raise self._stop(f"{what} at step {step}", path)
        if self._num_in_a_row >= self.most_in_a_row:
            raise self._stop(f"{what} at step {step}, after {self._num_in_a_row} rollbacks to one checkpoint", path)
        if trainer.is_global_zero:
            with _rollback_file(trainer).open("a") as file:
                file.write(json.dumps({"from": self._data_state, "to": self._cursor}) + "\n")
        self._agreement.gather(None)  # it is written before any rank reads it
        trainer.lightning_module.take_metrics()  # they are not finite either
        raise Rollback(f"not finite: {what} at step {step}, samples in {path}; back to the last checkpoint", NONFINITE)

    def _report(self, trainer: Trainer, notes: list[tuple[int, str, list[Tensor]]]) -> tuple[int, str, Path]:
        """Writes down the first step that is bad on any rank, with the samples of all ranks."""
        plain = [(step, bad, torch.cat(ids).tolist() if ids else []) for step, bad, ids in notes]
        of_ranks = self._agreement.gather(plain)
        found = [(step, rank, what) for rank, said in enumerate(of_ranks) for step, what, _ in said if what]
        # A gradient is shared by all ranks; the loss that it comes from is one rank's.
        step, rank, what = min(found, key=lambda bad: (bad[0], bad[2] != "loss", bad[1]))
        context = trainer.lightning_module.context
        path = context.run_directory / "nonfinite.jsonl"
        ids = [ids for said in of_ranks for at, _, ids in said if at == step]
        row = {"stage": context.stage, "step": step, "what": what, "rank": rank, "action": self.on_nonfinite}
        if trainer.is_global_zero:
            with path.open("a") as file:
                file.write(json.dumps(row | {"sample_id": sum(ids, [])}) + "\n")
        context.tracker.log(row | {"event": "nonfinite"})
        return step, what, path

    def _stop(self, what: str, path: Path) -> RunError:
        return RunError(
            f"not finite: {what}; its samples are in {path}; nothing non-finite was saved: lower the learning rate or "
            "look at these samples, then run it again",
            NONFINITE,
        )


def _has_scaler(trainer: Trainer) -> bool:
    """fp16: it skips a step with such a gradient and lowers its scale."""
    return trainer.precision == "16-mixed"


def _gradient_norm(trainer: Trainer) -> Tensor:
    """Over all ranks, wherever the strategy keeps the gradients."""
    if hasattr(trainer.strategy, "norms"):
        return torch.stack([*trainer.strategy.norms().values()]).norm()
    return total_norm([p.grad for p in trainer.lightning_module.parameters() if p.grad is not None])


def _data_state(trainer: Trainer) -> dict[str, Any]:
    return trainer.datamodule.state_dict() if trainer.datamodule is not None else {}


def _rollback_file(trainer: Trainer) -> Path:
    return trainer.lightning_module.context.directory / "rollback.jsonl"


def _read_rollbacks(path: Path) -> dict[str, dict[str, Any]]:
    """Where to go on, by the state that the data was in."""
    rows = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    return {_key(row["from"]): row["to"] for row in rows}


def _key(state: dict[str, Any]) -> str:
    return json.dumps(state, sort_keys=True)
