"""Stage 2 in small, before stage 1: what its parts refuse of each other is told now, not after days of training."""

from __future__ import annotations

import io
import math
import warnings
from contextlib import redirect_stdout
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from omegaconf import DictConfig, OmegaConf
from torch import Tensor

from sdtrain.build import build
from sdtrain.callback.log import COLUMNS
from sdtrain.conditioner.pretrained import find_folder
from sdtrain.contracts import Batch, Sampler
from sdtrain.errors import ConfigError
from sdtrain.interop.weights import load_model
from sdtrain.ops.meter import measure
from sdtrain.ops.random import Draw
from sdtrain.plan.estimate import build_stage
from sdtrain.stage.autoencoder import to_uint8
from sdtrain.stage.diffusion import DiffusionStage
from sdtrain.stage.generation import for_conditioner
from sdtrain.stage.latents import has_latents, require_room
from sdtrain.target import parts

_ABSENT = ("meta", "trainer")  # torch names the device where a number is asked for, Lightning what there is none of
_NUM_READ = 16  # samples: enough to meet a class that has no name
_LEAST_READ = 0.5  # of real pictures, by the metric that will read drawn ones


def rehearse(cfg: DictConfig) -> None:
    """Stage 2's data, a training step of its first samples, and drawing them, both as shapes on the meta device. Of
    weights to start from, names and shapes alone are read.

    A part of the user's own that does not run without numbers is not tried, and a line says so.

    Raises:
        ConfigError: for parts that do not fit each other, their data or their weights, and for files not there.
    """
    _find_files(cfg)
    stage, sampler, section = build_stage(cfg, "diffusion"), build(cfg.sampler), cfg.diffusion
    stage.context = SimpleNamespace(seed=cfg.seed)
    stage.optim.build(stage.parts(), section.trainer.max_steps)
    if cfg.model.weights:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*which is a no-op")  # torch, of what is on the meta device
            load_model(stage.model, cfg.model.weights, cfg.model)
    data, batch = _read(cfg, stage)
    side, latent_side = data.image_size, data.image_size // stage.first_stage.down_factor
    for size in _sizes(data):
        try:
            measure(lambda _, size=size: _train(stage, batch, size, section.cache_latents))
            if size == (side, side):
                measure(lambda _: _ask(stage, sampler, batch, latent_side))
                _sample(stage, sampler)
        except ConfigError:
            raise
        except RuntimeError as error:
            if not any(name in str(error).lower() for name in _ABSENT):
                told = "x".join(map(str, dict.fromkeys(size)))
                raise ConfigError(f"stage 2's parts do not fit each other at {told} pixels: {error}") from error
            return _tell(error)
        except Exception as error:  # a part of the user's own may ask for what only numbers have
            return _tell(error)
    _check_alert(stage, section)
    return None


def check_sizes(cfg: DictConfig, name: str) -> None:
    """A stage's pictures are made of whole latents.

    Raises:
        ConfigError: naming the sides that can be had.
    """
    own = cfg[name].data is not None
    data, key = build(cfg[name].data if own else cfg.data), f"{name}.data" if own else "data"
    with torch.device("meta"):
        factor = build(cfg.first_stage).down_factor
    for side in (side for size in _sizes(data) for side in size if side % factor):
        raise ConfigError(
            f"{key}: a side of {side} pixels is no multiple of {factor}, the pixels that a latent stands for; make "
            f"{key}.image_size and, where there are buckets, their step multiples of {factor}"
        )


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


def _read(cfg: DictConfig, stage: DiffusionStage) -> tuple[Any, Batch]:
    """The stage's data, and its first samples without their numbers. What there is to say of them, the stage says."""
    section = cfg.diffusion
    data = build(cfg.data if section.data is None else section.data)
    with redirect_stdout(io.StringIO()):
        data.connect(cfg.seed, section.trainer.batch_size, section.trainer.num_accumulate)
        data.prepare_data()
        data.setup()
        data.accompany(stage.conditioner.inputs)
        if not data.splits["train"]:
            raise ConfigError("data: no sample is left to train on; look at max_samples")
        if section.cache_latents and not has_latents(data):
            require_room(stage.first_stage, data)
        batch = data.load("train", range(min(_NUM_READ, data.splits["train"])))
    _check_reader(section, data, batch)
    batch = {name: value.to("meta") if isinstance(value, Tensor) else value for name, value in batch.items()}
    return data, batch | {"last_micro_of_step": False}


def _check_reader(section: DictConfig, data: Any, batch: Batch) -> None:  # noqa: ANN401 a data module
    """At the end of the stage pictures are read and held against what the data say of them: so are these, real ones."""
    reader = section.metric.get("caption_match")
    if not reader or "held_out" not in data.splits:
        return
    try:
        found = build(reader).score(to_uint8(batch["image"]), batch["attributes"])["all"]
    except (KeyError, TypeError):  # attributes of other names
        found = 0.0
    if found < _LEAST_READ:
        raise ConfigError(
            f"diffusion.metric.caption_match: it reads {found:.0%} of the data's own pictures right, so it is for "
            "others; write metric@diffusion.metric=diffusion_words with data=words, =diffusion with data=shapes"
        )


def _sizes(data: Any) -> list[tuple[int, int]]:  # noqa: ANN401 a data module
    """Height and width: of the square, of the longest bucket, and of the one whose sides have least in common."""
    square = (data.image_size,) * 2
    if getattr(data, "buckets", None) is None:
        return [square]
    shapes = data.buckets.table(data.image_size).shapes
    return [*dict.fromkeys((square, max(shapes, key=max), min(shapes, key=lambda shape: math.gcd(*shape))))]


def _train(stage: DiffusionStage, batch: Batch, size: tuple[int, int], is_cached: bool) -> Tensor:
    """The loss of a training step, on pictures of another size or on their latents."""
    inner, batch = stage.first_stage, dict(batch)
    if "image" in batch:
        image = batch.pop("image")[..., :1, :1].expand(-1, -1, *size)
        latent_shape = (2, inner.latent_channels, *(side // inner.down_factor for side in size))
        batch |= {"latent": torch.empty(len(image), *latent_shape)} if is_cached else {"image": image}
    return stage.training_step(batch, 0)["loss"]


def _ask(stage: DiffusionStage, sampler: Sampler, batch: Batch, side: int) -> None:
    """The denoiser as sampling asks it, with the condition and the null condition."""
    told = for_conditioner(batch, stage.first_stage, (side, side))
    cond, null, guidance = stage.conditioner(told), stage.conditioner.unconditional(told), sampler.guidance
    if "concat" in cond:
        guidance = replace(guidance, image_scale=None)  # would compare the two pictures' numbers
    x0_of = stage.objective.x0_of(stage.model, variance=getattr(sampler, "learned_variance", False))
    guidance(x0_of, cond, null)(torch.empty(len(batch["caption"]), stage.first_stage.latent_channels, side, side), 0.5)


def _sample(stage: DiffusionStage, sampler: Sampler) -> None:
    """The sampler's steps on the path, of one latent of zeros."""
    ids = torch.zeros(1, dtype=torch.int64)
    noise = torch.zeros(1, stage.first_stage.latent_channels, 1, 1)
    answer = torch.cat((noise, noise), dim=1) if getattr(sampler, "learned_variance", False) else noise
    sampler(lambda x, t: answer, noise, stage.objective.path, Draw(0, ids, ids))  # noqa: ARG005


def _check_alert(stage: DiffusionStage, section: DictConfig) -> None:
    """What is watched stands in the rows of the stage, of which a training step has been made."""
    alert = section.callback.get("alert")
    key, terms = (alert.get("key") or "loss") if alert else "loss", set(stage._sums)
    if "/" not in key and key not in terms | COLUMNS:
        known = ", ".join(sorted(terms))
        raise ConfigError(f"diffusion.callback.alert.key={key} is not in the stage's rows; there are {known}")


def _tell(error: Exception) -> None:
    print(f"diffusion: its parts were not tried together before stage 1: {error}", flush=True)
