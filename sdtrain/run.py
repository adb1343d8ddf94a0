"""run(cfg): the stages in order. A table of contents; what each step does stands in its room."""

from __future__ import annotations

import shlex
import time
from pathlib import Path

import lightning as L
import torch
from omegaconf import DictConfig
from safetensors.torch import save_file

from sdtrain.build import build
from sdtrain.errors import ConfigError
from sdtrain.first_stage.manifest import Manifest
from sdtrain.interop.told import example
from sdtrain.interop.weights import load_first_stage, load_model, own_whitening, save_first_stage
from sdtrain.ops.compile import compile_regions
from sdtrain.plan.rehearsal import check_sizes, rehearse
from sdtrain.session import Session, barrier
from sdtrain.stage.autoencoder import AutoencoderStage
from sdtrain.stage.diffusion import DiffusionStage
from sdtrain.stage.latents import (
    cache_latents,
    check_latents,
    has_latents,
    latent_figures,
    measure_latents,
    use_stored_text,
)
from sdtrain.stage.recognition import RecognitionStage, vocabulary
from sdtrain.tracker.report import write_report
from sdtrain.trainer import check_precision


def run(cfg: DictConfig) -> int:
    """Trains the stages that are asked for and not yet done; returns the exit code.

    Raises:
        ConfigError: for what the user can mend; the process then ends with 2.
        RunError: for a stop with a code of its own.
    """
    session = Session(cfg)
    stages = {"autoencoder": run_autoencoder, "diffusion": run_diffusion}
    with session.recorded():
        steps = {name: session.summary().get(name, {}).get("steps", -1) for name in cfg.stages}
        done = [name for name in steps if steps[name] >= cfg[name].trainer.max_steps and cfg.resume != "never"]
        build_once(cfg, [name for name in cfg.stages if name not in done])
        for name in cfg.stages:
            if name in done:
                print(f"{name}: finished before, not repeated", flush=True)
            else:
                with session.told_plainly(name):
                    stages[name](session)
        if session.is_first:
            print(f"\nreport  {write_report(session.directory)}\nnext    {next_command(session)}", flush=True)
    return 0


def run_autoencoder(session: Session) -> None:
    """Stage 1: the perceptual network where it is trained here, the autoencoder, the manifest."""
    cfg, section, started = session.cfg, session.cfg.autoencoder, time.monotonic()
    L.seed_everything(cfg.seed, verbose=False)
    first_stage = build(cfg.first_stage)
    if not list(first_stage.parameters()):
        print("autoencoder: this first stage has nothing to train", flush=True)
        return
    if cfg.resume != "never" and (session.directory / "diffusion" / "first_stage.json").exists():
        raise ConfigError(
            f"stage 2 in {session.directory} was trained on this autoencoder; for more steps of it take a new "
            f"output_dir, with first_stage.weights={session.directory / 'autoencoder'} to go on from it"
        )
    if cfg.first_stage.weights:
        load_first_stage(first_stage, cfg.first_stage.weights, cfg.first_stage)
    objective = build(section.objective)
    if section.recognition is not None and objective.perceptual is not None:
        objective.perceptual.module.load(str(run_recognition(session)))
    if section.compile:
        compile_regions(first_stage)
    stage = AutoencoderStage(
        session.context("autoencoder", section),
        first_stage=first_stage,
        objective=objective,
        optim=build(section.optim),
        clip_norm=section.trainer.clip_norm,
        metric=build_all(section.metric),
    )
    data = session.data(section)
    if has_latents(data):
        raise ConfigError("data: stage 1 trains on pictures, and these are latents; write stages=[diffusion]")
    summary = session.fit(stage, data, section)
    with stage.averaged_weights():
        manifest = measure_latents(first_stage, data)
        if session.is_first:
            save_first_stage(first_stage, cfg.first_stage, stage.context.directory)
            manifest.save(stage.context.directory / "manifest.json")
    session.write_summary("autoencoder", summary | latent_figures(manifest), started)


def run_recognition(session: Session) -> Path:
    """The perceptual loss's network, trained to name the captions' words; the file of its weights."""
    section, started = session.cfg.autoencoder.recognition, time.monotonic()
    path = session.directory / "recognition" / "vgg.safetensors"
    if path.exists():
        return path
    data = session.data(section)
    words = vocabulary(data.captions("train"), section.num_words)
    if not words:
        print("recognition: no word stands in two captions; its features stay random", flush=True)
    stage = RecognitionStage(
        session.context("recognition", section),
        network=build(section.network),
        words=words,
        optim=build(section.optim),
        clip_norm=section.trainer.clip_norm,
    )
    summary = session.fit(stage, data, section)
    if session.is_first:
        state = {name: tensor.cpu().contiguous() for name, tensor in stage.network.state_dict().items()}
        save_file(state, path.with_suffix(".tmp"))
        path.with_suffix(".tmp").replace(path)
    session.write_summary("recognition", summary, started)
    return path


def run_diffusion(session: Session) -> None:
    """Stage 2: the denoiser, on whitened latents of the frozen first stage."""
    cfg, section, started = session.cfg, session.cfg.diffusion, time.monotonic()
    data = session.data(section)
    first_stage = build(cfg.first_stage)
    weight_hash = whiten_first_stage(session, first_stage, data)
    L.seed_everything(cfg.seed, verbose=False)
    model, conditioner = build(cfg.model), build(cfg.conditioner)
    data.accompany(conditioner.inputs)  # refuses captions that are not there before words are learned from none
    if hasattr(conditioner, "prepare"):
        conditioner.prepare(session.directory / "diffusion", lambda: data.captions("train"))
    if cfg.model.weights:
        load_model(model, cfg.model.weights, cfg.model)
    if section.compile:
        compile_regions(model)
    stage = DiffusionStage(
        session.context("diffusion", section),
        model=model,
        conditioner=conditioner,
        objective=build(cfg.objective),
        sampler=build(cfg.sampler),
        first_stage=first_stage,
        optim=build(section.optim),
        clip_norm=section.trainer.clip_norm,
        metric=build_all(section.metric),
        decoded=build(section.decoded) if section.decoded else None,
    )
    if has_latents(data):
        prove_latents(session, stage, data)
    elif section.cache_latents:
        cache_latents(first_stage, data, section.precision or cfg.precision)
    summary = session.fit(stage, data, section)
    session.write_summary("diffusion", summary | {"first_stage": weight_hash}, started)


def prove_latents(session: Session, stage: DiffusionStage, data: L.LightningDataModule) -> None:
    """Refuses latents on disk that are not the first stage's own, and says what was proven.

    Raises:
        ConfigError: naming the field, the sample, or what asks for pictures that are gone.
    """
    use_stored_text(stage.conditioner, data)
    num = check_latents(stage.first_stage, data, session.cfg.seed)
    distribution = stage.metric.get("distribution")
    wanting = ["memorisation"] if "memorisation" in stage.metric else []
    wanting += ["distribution"] if distribution is not None and distribution.real is None else []
    if num == 0 and wanting:
        raise ConfigError(
            f"diffusion.metric.{wanting[0]} looks at pictures, and the shards that the latents were made of are gone; "
            f"set diffusion.metric.{wanting[0]}=null"
        )
    if session.is_first:
        gone = "their shards are gone, so none was encoded again"
        print(f"latents: {f'{num} encoded again, they agree' if num else gone}", flush=True)


def whiten_first_stage(session: Session, first_stage: torch.nn.Module, data: L.LightningDataModule) -> str | None:
    """Loads the frozen first stage with its whitening: this run's, or weights from elsewhere, measured at first use.

    Raises:
        ConfigError: where there is none, or the run was begun with another.
    """
    if not list(first_stage.parameters()):
        return None
    own, weights = session.directory / "autoencoder", session.cfg.first_stage.weights
    if not weights and not (own / "manifest.json").exists():
        raise ConfigError(
            f"stage 2 needs a first stage, and {own} holds no finished one: "
            "add autoencoder to stages, or set first_stage.weights"
        )
    is_own = (own / "manifest.json").exists()  # what stage 1 made here, be it of `weights`
    found = load_first_stage(first_stage, str(own) if is_own else weights, session.cfg.first_stage)
    beside = session.directory / "first_stage.manifest.json"
    if found is not None or beside.exists():
        manifest = Manifest.load(found or beside)
    else:
        own_scale = own_whitening(first_stage, weights, data.image_size)
        manifest = measure_latents(first_stage, data) if own_scale is None else own_scale
    manifest.apply(first_stage)
    pinned = session.directory / "diffusion" / "first_stage.json"
    if pinned.exists():
        Manifest.load(pinned).require(manifest)
    elif session.is_first:
        manifest.save(pinned)
        if found is None:
            manifest.save(beside)
    barrier()
    return manifest.weight_hash


def build_once(cfg: DictConfig, stages: list[str]) -> None:
    """What a machine or a part refuses, and a file that is not there, are told now, not after stage 1."""
    for name in stages:
        check_precision(cfg, cfg[name])
        build_all(cfg[name].callback)
        build(cfg[name].optim)
        if cfg[name].strategy:
            build(cfg[name].strategy)
        check_sizes(cfg, name)
    if "diffusion" in stages:
        build_all(cfg.diffusion.metric)
        for node in (cfg.sampler, cfg.objective):
            build(node)
        with torch.device("meta"):
            build(cfg.model)
        if not Path(cfg.output_dir, "diffusion", "checkpoints").expanduser().exists():  # what has trained fits
            rehearse(cfg)


def build_all(section: DictConfig) -> dict[str, object]:
    """The parts of a section by name, those that are null left out."""
    return {name: build(node) for name, node in section.items() if node}


def next_command(session: Session) -> str:
    """What to type after this."""
    if "diffusion" in session.cfg.stages:
        told = example(session.cfg.conditioner, session.directory)
        return f"python tools/sample.py {shlex.quote(session.cfg.output_dir)} {told}"
    return f"the same command with stages=[diffusion] {shlex.quote(f'output_dir={session.cfg.output_dir}')}"
