"""One run directory and what its stages share: the config on disk, the tracker, the summary, the exit code."""

from __future__ import annotations

import json
import logging
import re
import time
import traceback
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TextIO

import lightning as L
import torch
from omegaconf import DictConfig

from sdtrain.agreement import doubts
from sdtrain.build import build
from sdtrain.callback import ending
from sdtrain.callback.accounts import counted
from sdtrain.callback.guard import Rollback
from sdtrain.callback.log import Log
from sdtrain.callback.mfu import MFU
from sdtrain.checkpoint.claim import claim
from sdtrain.checkpoint.disk import told_of_disk
from sdtrain.continuation import (
    begin_anew,
    check_continuation,
    code_version,
    config_hash,
    resolve_and_redact,
    write_config,
)
from sdtrain.contracts import Context
from sdtrain.errors import RunError
from sdtrain.interop.prediction import other_prediction
from sdtrain.ops.denormal import flush_denormals
from sdtrain.ops.memory import keep_freed_memory
from sdtrain.stage.base import Stage, num_values
from sdtrain.strategy.slurm import check_slurm
from sdtrain.tracker.fanout import Fanout
from sdtrain.tracker.jsonl import JsonlTracker
from sdtrain.tracker.none import NullTracker
from sdtrain.trainer import go_on_from, make_trainer


class Session:
    """A run's directory, opened for this process. Only the first rank writes in it.

    Raises:
        ConfigError: where the directory holds a run of another config, or cannot be written.
    """

    def __init__(self, cfg: DictConfig) -> None:
        # `check_slurm` tells where srun is missing; that it exists, as on a login node, is no news.
        warnings.filterwarnings("ignore", message="The `srun` command is available")
        self.cfg = cfg
        self.directory = Path(cfg.output_dir).expanduser().resolve()
        self.rank = ending.global_rank()
        self.is_first = self.rank == 0
        self.tracker: Any = NullTracker()
        self.fitting: L.Trainer | None = None
        self._claim: TextIO | None = None
        check_slurm(cfg.devices, cfg.num_nodes)
        code_version()  # of every rank, as it was imported
        keep_freed_memory()
        flush_denormals()
        check_continuation(self.directory, cfg)
        for name in ("lightning.pytorch", "lightning.fabric"):
            logging.getLogger(name).setLevel(logging.ERROR)
        if self.is_first:
            try:
                self._open()
            except OSError as error:
                raise told_of_disk(error, self.directory)  # noqa: B904 it is its cause, or it is the same

    def _open(self) -> None:
        """Takes the directory, writes down what runs in it, and tells what is other than before."""
        cfg = self.cfg
        self.directory.mkdir(parents=True, exist_ok=True)
        self._claim = claim(self.directory)
        # Again: another run may have ended while this one waited.
        changes = [*check_continuation(self.directory, cfg), *other_prediction(cfg)]
        ending.forget(self.directory)
        for line in begin_anew(self.directory, cfg.stages) if cfg.resume == "never" else []:
            print(line, flush=True)
        write_config(self.directory, cfg)
        rows = JsonlTracker(self.directory / "metrics.jsonl")
        self.tracker = Fanout(rows, [build(cfg.tracker)])
        for line in [*doubts(cfg), *changes, *self._note_code(rows)]:  # no stage has begun: mirrors have no run yet
            print(f"warning: {line}", flush=True)
            rows.log({"event": "warning", "warning": line})

    def _note_code(self, rows: JsonlTracker) -> list[str]:
        """Writes down what code runs; a warning where it is not what ran here before."""
        code, file = code_version(), self.directory / "code.json"
        before = ending.read_json(file)
        if before is not None and before["source"] == code["source"]:
            return []
        ending.write_json(file, code)
        rows.log({"event": "code", **code})
        if before is None:
            return []
        told = [" ".join(f"{key} {value}" for key, value in each.items()) for each in (before, code)]
        return [f"the code differs from that of the run before: {told[0]} -> {told[1]}"]

    def context(self, stage: str, section: DictConfig) -> Context:
        """Where a stage runs."""
        stages = list(self.cfg.stages)
        return Context(
            stage=stage,
            run_directory=self.directory,
            directory=self.directory / stage,
            tracker=self.tracker,
            seed=self.cfg.seed,
            global_batch_size=section.trainer.batch_size,
            max_steps=section.trainer.max_steps,
            stage_index=stages.index(stage) + 1 if stage in stages else 1,
            num_stages=len(stages),
            config_hash=config_hash(self.cfg),
        )

    def data(self, section: DictConfig) -> L.LightningDataModule:
        """The stage's own data, or else the run's."""
        data = build(self.cfg.data if section.data is None else section.data)
        self._connect(data, section)
        data.prepare_data()
        data.setup()
        return data

    def _connect(self, data: L.LightningDataModule, section: DictConfig) -> None:
        trainer = section.trainer
        data.connect(self.cfg.seed, trainer.batch_size, trainer.num_accumulate, self.directory / "quarantine")

    def fit(self, stage: Stage, data: L.LightningDataModule, section: DictConfig) -> dict[str, Any]:
        """Trains a stage to its last step, from its newest valid checkpoint, and returns its summary."""
        context, started = stage.context, time.monotonic()
        if self.is_first:
            self.tracker.start(self.directory, self.cfg.name, context.stage, resolve_and_redact(self.cfg))
        context.data_fingerprint = data.fingerprint
        stage.flops_per_image = self._count_flops(context.stage, section)
        resume = self._resume(context)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", module="lightning")
            warnings.filterwarnings("ignore", message=".*lr_scheduler.step.*before.*optimizer.step.*")
            while True:
                self.fitting = trainer = make_trainer(self.cfg, section, self.directory)
                go_on_from(trainer, context.directory / "checkpoints", resume)
                try:
                    trainer.fit(stage, datamodule=data)
                    break
                except Rollback as rollback:
                    if self.is_first:
                        print(f"{context.stage}: {rollback}", flush=True)
                    resume = "must"
                    self._connect(data, section)
        if self.is_first and trainer.global_step > context.max_steps:
            print(f"{context.stage}: is at step {trainer.global_step}, past max_steps={context.max_steps}", flush=True)
        stage.to(trainer.strategy.root_device).eval()
        trained = time.monotonic()
        with stage.averaged_weights():
            summary = stage.finish()
        for callback in trainer.callbacks:
            summary |= callback.summary() if isinstance(callback, Log | MFU) else {}
        return summary | {
            "steps": trainer.global_step,
            "images": stage.images_seen,
            "parameters": sum(map(num_values, stage.parameters())),
            "data": counted(data, trainer.world_size),
            "world_size": trainer.world_size,
            "strategy": type(trainer.strategy).__name__,
            "seconds": {"fit": round(trained - started, 1), "evaluation": round(time.monotonic() - trained, 1)},
        }

    def _count_flops(self, name: str, section: DictConfig) -> float:
        """Of training on an image, for the rank that writes rows; 0 where nothing reads it, or it cannot be known."""
        if not self.is_first or not section.callback.get("mfu") or name not in self.cfg:
            return 0.0
        try:
            from sdtrain.plan.estimate import training_flops

            return training_flops(self.cfg, name)
        except Exception as error:  # a part that does not run without numbers is no reason not to train
            print(f"{name}: no MFU, its FLOPs could not be counted: {error}", flush=True)
            return 0.0

    def _resume(self, context: Context) -> str:
        """`must` asks the run to go on, not that its next stage has begun: after a finished one that starts anew."""
        begins = bool(self.summary()) and not (context.directory / "checkpoints").exists()
        return "auto" if self.cfg.resume == "must" and begins else self.cfg.resume

    def summary(self) -> dict[str, Any]:
        """summary.json as it stands."""
        path = self.directory / "summary.json"
        return json.loads(path.read_text()) if path.exists() else {}

    def write_summary(self, stage: str, figures: dict[str, Any], started: float) -> None:
        """Adds a finished stage's figures to summary.json, atomically, and closes its mirrors' run."""
        if self.is_first:
            whole = {"name": self.cfg.name, "seconds": {}} | self.summary()
            whole |= {key: figures.pop(key) for key in ("world_size", "strategy")}
            whole[stage] = figures
            whole["seconds"][stage] = round(time.monotonic() - started, 1)
            whole["seconds"]["total"] = round(
                sum(v for k, v in whole["seconds"].items() if k not in ("total", "recognition")), 1
            )
            part = self.directory / "summary.json.tmp"
            part.write_text(json.dumps(whole, indent=2))
            part.replace(self.directory / "summary.json")
            self.tracker.finish(figures)
        barrier()

    @contextmanager
    def recorded(self) -> Iterator[None]:
        """DIR/exit.json says how the run ended, under any launcher; the first rank leaves last, with the code, and the
        directory is another run's to train in.
        """
        try:
            with ending.recorded(self.directory, self.rank, lambda: self.tracker.finish({})):
                yield
        finally:
            if self._claim is not None:
                self._claim.close()

    @contextmanager
    def told_plainly(self, name: str) -> Iterator[None]:
        """Where a stage runs out of memory, one line says what to lower; where torch cannot compile it, what to set.

        Raises:
            RunError: with that line, in place of the allocator's or the compiler's error.
        """
        try:
            yield
        except (RuntimeError, MemoryError) as error:
            if is_compilers(error):
                first_line = str(error).splitlines()[0]
                told = f"{name}.compile: torch cannot compile this network at its shapes and precision ({first_line})"
                raise RunError(f"{told}; set {name}.compile=false, or other widths", 1) from error
            if not is_out_of_memory(error):
                raise
            traceback.clear_frames(error.__traceback__)  # lets go of what they hold: the advice needs some, too
            asked = re.search(r"[Tt]ried to allocate ([\d.]+ \w+)", str(error))
            stage, step = name, "before training"
            if self.fitting is not None and self.fitting.lightning_module is not None:
                stage, step = self.fitting.lightning_module.context.stage, f"at step {self.fitting.global_step}"
            place = f"out of memory in {stage} {step}{f', asking for {asked[1]}' if asked else ''}"
            raise RunError(f"{place}: {self._advice(stage)}", 1) from None

    def _advice(self, stage: str) -> str:
        try:
            from sdtrain.plan.report import advise

            return advise(self.cfg, stage)
        except Exception:  # whatever goes wrong without memory, it is the run's end that is told
            section = "autoencoder.recognition" if stage == "recognition" else stage
            return f"lower {section}.trainer.batch_size, or raise {section}.trainer.num_accumulate, which keeps it"


def is_compilers(error: BaseException) -> bool:
    """Whether torch.compile failed, of which nothing is imported here: that takes a second."""
    return any(kind.__name__ == "TorchDynamoException" for kind in type(error).__mro__)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an allocator of a CPU, of CUDA or of its libraries says so."""
    words = ("out of memory", "can't allocate memory", "CUBLAS_STATUS_ALLOC_FAILED")
    return isinstance(error, MemoryError | torch.OutOfMemoryError) or any(word in str(error) for word in words)


def barrier() -> None:
    """All ranks meet here, where there are several."""
    if ending.num_ranks() > 1:
        torch.distributed.barrier()
