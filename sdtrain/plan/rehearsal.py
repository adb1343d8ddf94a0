"""Stage 2 in small, before stage 1: what its parts refuse of each other is told now, not after days of training."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import torch
from omegaconf import DictConfig, OmegaConf

from sdtrain.build import build
from sdtrain.conditioner.pretrained import find_folder
from sdtrain.contracts import Sampler
from sdtrain.errors import ConfigError
from sdtrain.ops.meter import measure
from sdtrain.ops.random import Draw
from sdtrain.plan.estimate import batch_of, build_stage, loss_of
from sdtrain.stage.diffusion import DiffusionStage
from sdtrain.stage.generation import for_conditioner
from sdtrain.target import parts


def rehearse(cfg: DictConfig) -> None:
    """One training step and one picture of stage 2, as shapes on the meta device: no data and no weights are read.

    A part of the user's own that does not run without numbers is not tried, and a line says so.

    Raises:
        ConfigError: for parts that do not fit each other, and for pretrained encoders that are not there.
    """
    _find_files(cfg)
    stage, sampler, section = build_stage(cfg, "diffusion"), build(cfg.sampler), cfg.diffusion
    stage.optim.build(stage.parts(), section.trainer.max_steps)
    side = (section.data or cfg.data).get("image_size", 64)
    try:
        measure(lambda meter: loss_of(stage, section, 1, side, {}, meter))
        measure(lambda _: _ask(stage, sampler, side))
        _sample(stage, sampler)
    except ConfigError:
        raise
    except RuntimeError as error:
        if "meta" not in str(error).lower():  # torch names the device where a number was asked for
            raise ConfigError(f"stage 2's parts do not fit each other at {side} pixels: {error}") from error
        _tell(error)
    except Exception as error:  # a part of the user's own may ask for what only real samples have
        _tell(error)


def _find_files(cfg: DictConfig) -> None:
    """Those that stage 2 reads when it begins, but what the run makes itself before."""
    values = OmegaConf.to_container(cfg, resolve=True)
    for path, node in parts(values["conditioner"], "conditioner"):
        if node.get("pretrained"):
            try:
                find_folder(node["pretrained"], "text encoder")
            except ConfigError as error:
                raise ConfigError(f"{path}.{error}") from None
    made = Path(values["output_dir"], "recognition") if values["autoencoder"]["recognition"] else None
    for path, node in parts(values["diffusion"]["decoded"], "diffusion.decoded"):
        for place in (Path(node[key]).expanduser() for key in ("weights", "heads") if node.get(key)):
            if not place.is_file() and made not in place.parents:
                raise ConfigError(f"{path}: no file {place}; give the one that stage 1's perceptual loss reads")


def _ask(stage: DiffusionStage, sampler: Sampler, side: int) -> None:
    """The denoiser as sampling asks it, with the condition and the null condition."""
    size = (side // stage.first_stage.down_factor,) * 2
    told = for_conditioner(batch_of(1, side), stage.first_stage, size)
    cond, null, guidance = stage.conditioner(told), stage.conditioner.unconditional(told), sampler.guidance
    if "concat" in cond:
        guidance = replace(guidance, image_scale=None)  # would compare the two pictures' numbers
    x0_of = stage.objective.x0_of(stage.model, variance=getattr(sampler, "learned_variance", False))
    guidance(x0_of, cond, null)(torch.empty(1, stage.first_stage.latent_channels, *size), 0.5)


def _sample(stage: DiffusionStage, sampler: Sampler) -> None:
    """The sampler's steps on the path, of one latent of zeros."""
    ids = torch.zeros(1, dtype=torch.int64)
    noise = torch.zeros(1, stage.first_stage.latent_channels, 1, 1)
    answer = torch.cat((noise, noise), dim=1) if getattr(sampler, "learned_variance", False) else noise
    sampler(lambda x, t: answer, noise, stage.objective.path, Draw(0, ids, ids))  # noqa: ARG005


def _tell(error: Exception) -> None:
    print(f"diffusion: its parts were not tried together before stage 1: {error}", flush=True)
