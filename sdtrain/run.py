"""run(cfg): the stages in order. A table of contents; what each step does stands in its room."""

from __future__ import annotations

import json
import os
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.plugins.environments import SLURMEnvironment
from omegaconf import DictConfig, OmegaConf

from sdtrain.build import build
from sdtrain.checkpoint.commit import find_resume
from sdtrain.continuation import check_continuation, config_hash, resolve_and_redact
from sdtrain.contracts import Context
from sdtrain.errors import ConfigError, RunError
from sdtrain.first_stage.manifest import Manifest, measure
from sdtrain.interop.weights import load_first_stage, load_model, save_first_stage
from sdtrain.stage.autoencoder import AutoencoderStage
from sdtrain.stage.base import Stage
from sdtrain.stage.diffusion import DiffusionStage
from sdtrain.stage.recognition import RecognitionStage, vocabulary
from sdtrain.strategy.commit_io import CommitIO
from sdtrain.tracker.fanout import Fanout
from sdtrain.tracker.jsonl import JsonlTracker
from sdtrain.tracker.none import NullTracker
from sdtrain.tracker.report import write_report


class Run:
    """One run directory and what its stages share."""

    def __init__(self, cfg: DictConfig) -> None:
        self.cfg = cfg
        self.directory = Path(cfg.output_dir).expanduser().resolve()
        self.is_first = int(os.environ.get("RANK", os.environ.get("SLURM_PROCID", os.environ.get("LOCAL_RANK", 0)))) == 0
        self.started = time.monotonic()
        self.warnings = check_continuation(self.directory, cfg)
        self.tracker: Any = NullTracker()
        if self.is_first:
            self.directory.mkdir(parents=True, exist_ok=True)
            for old in ("exit.json",):
                (self.directory / old).unlink(missing_ok=True)
            (self.directory / "config.yaml").write_text(OmegaConf.to_yaml(OmegaConf.create(resolve_and_redact(cfg))))
            self.tracker = Fanout(JsonlTracker(self.directory / "metrics.jsonl"), [build(cfg.tracker)])
            for warning in self.warnings:
                print(f"warning: {warning}", flush=True)
                self.tracker.log({"event": "warning", "warning": warning})

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
        """The stage's data: its own, or the run's."""
        override = section.get("data")
        data = build(self.cfg.data if override is None else section.data)
        data.connect(self.cfg.seed, section.trainer.batch_size, section.trainer.num_accumulate)
        if self.is_first:
            data.prepare_data()
        return data

    def trainer(self, section: DictConfig) -> L.Trainer:
        """Lightning's trainer, with our checkpoints, our callbacks and none of its own."""
        chosen = {key: section.get(key) if section.get(key) is not None else self.cfg[key] for key in ("strategy", "precision")}
        accelerator = "cuda" if self.cfg.accelerator == "gpu" else self.cfg.accelerator
        with _told("accelerator"):
            return L.Trainer(
                accelerator=accelerator,
                devices=self.cfg.devices,
                num_nodes=self.cfg.num_nodes,
                strategy=build(chosen["strategy"]),
                precision=chosen["precision"],
                max_steps=section.trainer.max_steps,
                max_epochs=-1,
                accumulate_grad_batches=section.trainer.num_accumulate,
                callbacks=[build(node) for node in section.callback.values() if node],
                plugins=[CommitIO()] + ([SLURMEnvironment(auto_requeue=False)] if SLURMEnvironment.detect() else []),
                logger=False,
                enable_checkpointing=False,
                enable_progress_bar=False,
                enable_model_summary=False,
                use_distributed_sampler=False,
                num_sanity_val_steps=0,
                limit_val_batches=0,
                default_root_dir=self.directory,
            )

    def fit(self, stage: Stage, data: L.LightningDataModule, section: DictConfig) -> dict[str, Any]:
        """Trains a stage to its last step, from its newest valid checkpoint, and returns its summary."""
        context = stage.context
        started = time.monotonic()
        self.tracker_start(context.stage)
        trainer = self.trainer(section)
        if self.cfg.accelerator == "cpu" and self.cfg.devices != 1 and trainer.world_size == 1:
            raise ConfigError("devices on a CPU is a number of processes")
        data.setup()
        context.data_fingerprint = data.fingerprint
        checkpoint = find_resume(context.directory / "checkpoints", self.cfg.resume)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", module="lightning")
            trainer.fit(stage, datamodule=data, ckpt_path=checkpoint)
        stage.to(trainer.strategy.root_device)
        stage.eval()
        with stage.averaged_weights():
            summary = stage.finish()
        summary |= {"steps": trainer.global_step, "images": stage.images_seen, "data": data.accounting()}
        summary |= {"world_size": trainer.world_size, "strategy": type(trainer.strategy).__name__, "parameters": sum(p.numel() for p in stage.parameters())}
        return summary | {"seconds": time.monotonic() - started}

    def tracker_start(self, stage: str) -> None:
        """Mirrors open their run of this stage."""
        if self.is_first:
            self.tracker.start(self.directory, self.cfg.name, stage, resolve_and_redact(self.cfg))

    def write_summary(self, stage: str, summary: dict[str, Any]) -> None:
        """Adds a stage's figures to summary.json, atomically."""
        if not self.is_first:
            return
        path = self.directory / "summary.json"
        whole = json.loads(path.read_text()) if path.exists() else {"seconds": {}}
        whole[stage] = {k: v for k, v in summary.items() if k not in ("seconds", "world_size", "strategy")}
        whole["seconds"][stage] = round(summary["seconds"], 1)
        whole["seconds"]["total"] = round(sum(v for k, v in whole["seconds"].items() if k != "total"), 1)
        whole |= {"world_size": summary["world_size"], "strategy": summary["strategy"], "name": self.cfg.name}
        part = path.with_suffix(".tmp")
        part.write_text(json.dumps(whole, indent=2))
        part.replace(path)
        self.tracker.finish(summary)


def run(cfg: DictConfig) -> int:
    """Trains the stages that are asked for and not yet done; returns the exit code.

    Raises:
        ConfigError: for what the user can mend; the process then ends with 2.
        RunError: for a stop with a code of its own.
    """
    torch.set_float32_matmul_precision("high")
    L.seed_everything(cfg.seed, verbose=False)
    made = Run(cfg)
    with _exit_recorded(made):
        for stage in cfg.stages:
            if _is_done(made, stage):
                print(f"{stage}: finished before, not repeated", flush=True)
                continue
            {"autoencoder": run_autoencoder, "diffusion": run_diffusion}[stage](made)
    if made.is_first:
        report = write_report(made.directory)
        print(f"\nreport: {report}\nnext:   {_next_command(made)}", flush=True)
    return 0


def run_autoencoder(run: Run) -> None:
    """Stage 1: the perceptual network where it is trained here, the autoencoder, the manifest."""
    cfg, section = run.cfg, run.cfg.autoencoder
    first_stage = build(cfg.first_stage)
    if not list(first_stage.parameters()):
        print("autoencoder: the first stage has nothing to train", flush=True)
        return
    if cfg.first_stage.get("weights"):
        load_first_stage(first_stage, cfg.first_stage.weights, run.directory)
    L.seed_everything(cfg.seed, verbose=False)
    objective = build(section.objective)
    if section.recognition is not None and objective.perceptual is not None:
        objective.perceptual.module.load(str(run_recognition(run)))
    L.seed_everything(cfg.seed + 1, verbose=False)
    context = run.context("autoencoder", section)
    optim = build(section.optim)
    metric = {name: build(node) for name, node in section.metric.items() if node}
    stage = AutoencoderStage(context, first_stage, objective, optim, section.trainer.clip_norm, metric)
    data = run.data(section)
    summary = run.fit(stage, data, section)
    with stage.averaged_weights():
        manifest = measure_latents(first_stage, data, data.image_size)
        if run.is_first:
            save_first_stage(first_stage, cfg.first_stage, context.directory)
            manifest.save(context.directory / "manifest.json")
    run.write_summary("autoencoder", summary)


def run_recognition(run: Run) -> Path:
    """The small recognition network of a perceptual loss, trained on the captions' words; its file."""
    from safetensors.torch import save_file

    section = run.cfg.autoencoder.recognition
    path = run.directory / "recognition" / "vgg.safetensors"
    if path.exists():
        return path
    data = run.data(section)
    data.setup()
    words = vocabulary(data.captions("train"), section.num_words)
    if not words:
        print("recognition: no word stands in two captions; its features stay random", flush=True)
    L.seed_everything(run.cfg.seed + 2, verbose=False)
    context = run.context("recognition", section)
    stage = RecognitionStage(context, build(section.network), words, build(section.optim), section.trainer.clip_norm)
    summary = run.fit(stage, data, section)
    if run.is_first:
        path.parent.mkdir(parents=True, exist_ok=True)
        part = path.with_suffix(".tmp")
        save_file({k: v.contiguous() for k, v in stage.network.state_dict().items()}, part)
        part.replace(path)
    run.write_summary("recognition", summary)
    return path


def run_diffusion(run: Run) -> None:
    """Stage 2: the denoiser on whitened latents of the frozen first stage."""
    cfg, section = run.cfg, run.cfg.diffusion
    data = run.data(section)
    data.setup()
    first_stage = build(cfg.first_stage)
    manifest = first_stage_manifest(run, first_stage, data)
    L.seed_everything(cfg.seed, verbose=False)
    model, conditioner = build(cfg.model), build(cfg.conditioner)
    if hasattr(conditioner, "prepare"):
        conditioner.prepare(run.directory / "diffusion", lambda: data.captions("train"))
    if cfg.model.get("weights"):
        load_model(model, cfg.model.weights)
    decoded = build(section.decoded) if section.decoded else None
    metric = {name: build(node) for name, node in section.metric.items() if node}
    stage = DiffusionStage(
        run.context("diffusion", section),
        model=model,
        conditioner=conditioner,
        objective=build(cfg.objective),
        sampler=build(cfg.sampler),
        first_stage=first_stage,
        optim=build(section.optim),
        clip_norm=section.trainer.clip_norm,
        metric=metric,
        decoded=decoded,
    )
    if section.cache_latents:
        cache_latents(first_stage, data)
    summary = run.fit(stage, data, section)
    run.write_summary("diffusion", summary | {"first_stage": manifest.weight_hash if manifest else None})


def first_stage_manifest(run: Run, first_stage: torch.nn.Module, data: L.LightningDataModule) -> Manifest | None:
    """Loads the frozen first stage and gives it its whitening: this run's own, or weights from elsewhere, measured at first use."""
    if not list(first_stage.parameters()):
        return None
    weights = run.cfg.first_stage.get("weights")
    own = run.directory / "autoencoder"
    if not weights and not (own / "manifest.json").exists():
        raise ConfigError(f"stage 2 needs a first stage, and {own} holds none: add autoencoder to stages, or set first_stage.weights")
    path = load_first_stage(first_stage, weights or str(own), run.directory)
    if path is None:
        path = run.directory / "first_stage.manifest.json"
        if not path.exists():
            measured = measure_latents(first_stage, data, data.image_size)
            if run.is_first:
                measured.save(path)
    manifest = Manifest.load(path)
    manifest.apply(first_stage)
    pinned = run.directory / "diffusion" / "first_stage.json"
    if pinned.exists():
        Manifest.load(pinned).require(manifest)
    elif run.is_first:
        manifest.save(pinned)
    return manifest


@torch.no_grad()
def measure_latents(first_stage: torch.nn.Module, data: L.LightningDataModule, image_size: int, num_images: int = 4096) -> Manifest:
    """The latent statistics over training pictures, in order."""
    num = min(num_images, data.splits["train"])
    device = next(first_stage.parameters()).device

    def moments() -> Iterator[torch.Tensor]:
        for start in range(0, num, 128):
            image = data.load("train", range(start, min(start + 128, num)), as_images=True)["image"].to(device)
            yield torch.stack(first_stage.encode(image), dim=1).cpu()

    return measure(first_stage, moments(), image_size)


@torch.no_grad()
def cache_latents(first_stage: torch.nn.Module, data: L.LightningDataModule) -> None:
    """Encodes every picture once, in order and in fixed batches, so that a resumed run holds the same bits."""
    for split in ("train", "val"):
        parts = []
        for start in range(0, data.splits[split], 128):
            image = data.load(split, range(start, min(start + 128, data.splits[split])))["image"]
            parts.append(torch.stack(first_stage.encode(image), dim=1).half())
        data.attach_latents(split, torch.cat(parts))


def _is_done(run: Run, stage: str) -> bool:
    """A stage is finished when its summary stands at its last step."""
    path = run.directory / "summary.json"
    summary = json.loads(path.read_text()) if path.exists() else {}
    return stage in summary and summary[stage]["steps"] >= run.cfg[stage].trainer.max_steps


def _next_command(run: Run) -> str:
    if "diffusion" in run.cfg.stages:
        return f'python tools/sample.py {run.cfg.output_dir} "a big red star on a white background, in the center"'
    return f"python -m sdtrain ... stages=[diffusion] output_dir={run.cfg.output_dir}"


@contextmanager
def _told(key: str) -> Iterator[None]:
    """Lightning's complaints about the machine as ours."""
    from lightning.fabric.utilities.exceptions import MisconfigurationException

    try:
        yield
    except (MisconfigurationException, ValueError, RuntimeError) as error:
        raise ConfigError(f"{key}: {str(error).splitlines()[0]}") from error


@contextmanager
def _exit_recorded(run: Run) -> Iterator[None]:
    """DIR/exit.json says how the run ended, under any launcher."""
    code, why = 1, "crashed"
    try:
        yield
        code, why = 0, "done"
    except (ConfigError, RunError) as error:
        code, why = error.exit_code, str(error).splitlines()[0]
        raise
    finally:
        if run.is_first:
            (run.directory / "exit.json").write_text(json.dumps({"exit_code": code, "reason": why}))
