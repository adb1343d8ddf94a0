"""Lightning's trainer as a session drives it: our checkpoints, callbacks and signals, and none of its own."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.plugins.environments import SLURMEnvironment
from lightning.pytorch.profilers import PassThroughProfiler
from omegaconf import DictConfig

from sdtrain.build import build
from sdtrain.callback import ending
from sdtrain.checkpoint.commit import find_resume
from sdtrain.continuation import code_version
from sdtrain.errors import ConfigError, RunError
from sdtrain.strategy.commit_io import CommitIO


def make_trainer(cfg: DictConfig, section: DictConfig, directory: Path) -> L.Trainer:
    """For one fit of the stage that `section` configures, in the run's directory.

    Raises:
        ConfigError: for a machine or a precision that is not there.
    """
    strategy = cfg.strategy if section.strategy is None else section.strategy
    precision = section.precision or cfg.precision
    try:
        trainer = L.Trainer(
            accelerator=cfg.accelerator,
            devices=cfg.devices,
            num_nodes=cfg.num_nodes,
            strategy=build(strategy),
            precision=precision,
            max_steps=section.trainer.max_steps,
            max_epochs=-1,
            accumulate_grad_batches=section.trainer.num_accumulate,
            callbacks=[build(node) for node in section.callback.values() if node],
            plugins=[CommitIO(), *([SLURMEnvironment(auto_requeue=False)] if ending.launched_by_slurm() else [])],
            logger=False,
            profiler=NoProfiler(),
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            use_distributed_sampler=False,
            num_sanity_val_steps=0,
            limit_val_batches=0,
            default_root_dir=directory,
        )
    except MisconfigurationException as error:
        raise ConfigError(
            f"accelerator={cfg.accelerator} devices={cfg.devices}: {str(error).splitlines()[0]}"
        ) from error
    if trainer.precision != precision:  # whatever else Lightning replaces
        raise ConfigError(f"precision={precision} became {trainer.precision} on this machine; write that")
    # Signals are callback/stop.py's. Lightning's own handlers run a collective inside the handler, and its loop
    # asks all ranks before every batch, and waits for the device, whether one of them was told to stop.
    trainer._signal_connector.register_signal_handlers = lambda: None
    trainer.fit_loop.epoch_loop._broadcast_sigterm_tensor = lambda: None
    ending.launchers.append(trainer.strategy.launcher)
    return trainer


def check_precision(cfg: DictConfig, section: DictConfig) -> None:
    """Raises ConfigError for 16-mixed where there is but a CPU, which Lightning replaces and says so to nobody."""
    if (section.precision or cfg.precision) == "16-mixed" and not torch.accelerator.is_available():
        key = section._get_full_key("precision") if section.precision else "precision"
        raise ConfigError(f"{key}=16-mixed does not exist on a CPU; write {key}=bf16-mixed or {key}=32-true")


def go_on_from(trainer: L.Trainer, checkpoints: Path, resume: str) -> None:
    """Lets the trainer's fit begin from the newest valid one of the stage's checkpoints, as `resume` says.

    Raises:
        RunError: where Lightning asks for a checkpoint in another way than we answer.
    """
    connector = trainer._checkpoint_connector
    if not hasattr(connector, "_select_ckpt_path"):  # a resume that never happens must not be silent
        raise RunError("this Lightning asks for checkpoints elsewhere: install constraints.txt's", 1)
    connector._select_ckpt_path = partial(_choose, trainer, checkpoints, resume)


def _choose(trainer: L.Trainer, checkpoints: Path, resume: str, *_: Any, **__: Any) -> Path | None:
    """The checkpoint that a fit goes on from. Lightning asks once all ranks are there; one of them verifies it."""
    trainer.strategy.setup_environment()  # a moment early, and then again: from here on the ranks can talk
    check_code(trainer.world_size)
    return find_resume(checkpoints, resume, trainer.global_rank, trainer.strategy.broadcast)


def check_code(num_ranks: int) -> None:
    """All ranks together.

    Raises:
        ConfigError: where they run different code, as when it is edited while they start; their weights would diverge.
    """
    if num_ranks > 1:
        told: list[Any] = [None] * num_ranks
        torch.distributed.all_gather_object(told, code_version()["source"])
        other = [rank for rank, source in enumerate(told) if source != told[0]]
        if other:
            raise ConfigError(
                f"rank {', '.join(map(str, other[:8]))} runs other code than rank 0, by the hash of the package's "
                "source; install the same everywhere and leave it alone while a run starts, then start it again"
            )


class NoProfiler(PassThroughProfiler):
    """Lightning asks for it around every hook of every callback; its own makes a context manager each time."""

    _context: AbstractContextManager[None] = nullcontext()

    def profile(self, action_name: str) -> AbstractContextManager[None]:  # noqa: ARG002
        return self._context
