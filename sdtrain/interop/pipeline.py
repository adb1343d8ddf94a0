"""A finished run as a function from what its model is told to pictures, three lines in a notebook:

from sdtrain.interop.pipeline import Pipeline
pipe = Pipeline.load("outputs/quickstart")
pipe("a big red star on a white background, in the center")[0]

Other models are told other things, by their names: pipe(label=3), pipe(num=4) for one without a condition,
pipe("a star", image="x.png", mask="m.png"), pipe("a star", image="small.png"), pipe("red", source="x.png").
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import torch
from hydra import compose, initialize_config_dir
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from PIL import Image
from torch import nn
from yaml import YAMLError

from sdtrain.build import build
from sdtrain.checkpoint.commit import newest_valid
from sdtrain.config import config_directory
from sdtrain.contracts import Batch, Input
from sdtrain.errors import ConfigError
from sdtrain.first_stage.manifest import Manifest
from sdtrain.interop.told import followed_size, read_told
from sdtrain.interop.weights import load_first_stage, read_checkpoint
from sdtrain.layer.resnet import Downsample
from sdtrain.stage.generation import Generation
from sdtrain.target import nearest, read_signature

_PIXELS_AT_ONCE = 128 * 64 * 64
_KEPT = ("num_steps", "guidance", "shift")  # the run's own values, whatever the sampler


class Pipeline:
    """Draws pictures with the weights, the sampler and the precision of a run.

    Args:
        cfg: the run's config.
        generation: its parts, loaded and on their device.
    """

    def __init__(self, cfg: DictConfig, generation: Generation) -> None:
        self.cfg, self.generation = cfg, generation

    @classmethod
    def load(cls, run_directory: str | Path, weights: str | Path = "ema", device: str = "auto") -> Pipeline:
        """The newest valid checkpoint of a run's stage 2, wherever its directory lies now.

        Args:
            weights: "ema", which is what the run's own figures and previews are of, "raw", or a file of averages that
                tools/ema.py made. A run without an average has its raw weights only.
            device: "auto" takes CUDA, MPS or the CPU.

        Raises:
            ConfigError: where there is no such run, it has no stage 2, or its files do not fit each other.
        """
        if weights not in ("ema", "raw") and not Path(weights).is_file():
            raise ConfigError(f"weights={weights} is neither ema nor raw nor a file")
        directory = Path(run_directory).expanduser()
        cfg = _read_config(directory)
        checkpoint, skipped = newest_valid(directory / "diffusion" / "checkpoints")
        if checkpoint is None:
            reason = f" ({len(skipped)} are damaged: {skipped[0][1]})" if skipped else ""
            raise ConfigError(f"{directory} holds no checkpoint of stage 2{reason}: train it with stages=[diffusion]")
        model, conditioner = build(cfg.model), build(cfg.conditioner)
        if hasattr(conditioner, "prepare"):
            conditioner.prepare(directory / "diffusion", lambda: _no_tokenizer(directory))
        _load_learned(nn.ModuleDict({"model": model, "conditioner": conditioner}), checkpoint, weights)
        first_stage = _load_frozen(directory, cfg)
        data = cfg.data if cfg.diffusion.data is None else cfg.diffusion.data
        side = build(data).image_size // first_stage.down_factor  # its constructor reads and writes nothing
        if device == "auto":
            device = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
        for module in (model, conditioner, first_stage):
            module.to(device).eval().requires_grad_(False)
        parts = (model, conditioner, build(cfg.objective), first_stage, build(cfg.sampler))
        return cls(cfg, Generation(*parts, latent_size=(side, side)))

    @property
    def inputs(self) -> Mapping[str, Input]:
        """What this model is told, by the names that a call takes."""
        return self.generation.conditioner.inputs

    def __call__(
        self,
        captions: str | Sequence[str] | None = None,
        negative: str | None = None,
        guidance_scale: float | None = None,
        num_steps: int | None = None,
        size: int | tuple[int, int] | None = None,
        seed: int = 0,
        sampler: str | None = None,
        num: int | None = None,
        image_guidance_scale: float | None = None,
        **told: Any,  # noqa: ANN401
    ) -> list[Image.Image]:
        """Pictures; picture i depends on what is told of it, its place i and the seed alone.

        Args:
            captions: one for all pictures, or one for each.
            negative: what to move away from instead of the empty caption.
            guidance_scale, num_steps: the run's own by default.
            size: pixels a side, or (width, height); by default what the run was trained on, or as many times the
                picture to enlarge as the first stage enlarges.
            sampler: another one of configs/sampler/, with the run's steps, guidance and shift where not given here.
            num: pictures; by default as many as are told apart.
            image_guidance_scale: of a picture to edit, apart from that of the text.
            told: what else this model reads, `inputs` says by which name; one for all pictures, or a list with one for
                each. label: a number or a name. image, source, mask: a path or a picture of Pillow's, scaled to cover
                what is drawn and cut; white is painted. noise_level: on a picture to enlarge. original_size,
                target_size: as `size`. crop_top_left: pixels.

        Raises:
            ConfigError: for a value that cannot be, one that is missing, and one that this model does not read.
        """
        if captions is not None:
            told["caption"] = captions if isinstance(captions, str) else list(captions)
        if negative is not None and "caption" not in self.inputs:
            raise ConfigError("negative is given, and this run's model reads no caption")
        if guidance_scale is not None and not self.inputs:
            raise ConfigError("guidance_scale is given, and this run's model reads nothing that it could be guided by")
        down_factor = self.generation.first_stage.down_factor
        size = followed_size(told, self.inputs, down_factor) if size is None else size
        latent_size = self._latent_size(size)
        image_size = (latent_size[0] * down_factor, latent_size[1] * down_factor)
        batch = read_told(told, self.inputs, num, {"image_size": image_size, "latent_size": latent_size})
        more = (latent_size, negative, image_guidance_scale)
        pictures = self.draw(batch, seed, guidance_scale, num_steps, sampler, *more)
        return [Image.fromarray(picture) for picture in pictures]

    def draw(
        self,
        batch: Batch,
        seed: int,
        guidance_scale: float | None = None,
        num_steps: int | None = None,
        sampler: str | None = None,
        latent_size: tuple[int, int] | None = None,
        negative: str | None = None,
        image_guidance_scale: float | None = None,
    ) -> np.ndarray:
        """The same of a batch that has all that the conditioner reads, such as the data's -> uint8 (N, H, W, 3)."""
        if num_steps is not None and num_steps < 1:
            raise ConfigError(f"num_steps={num_steps} must be at least 1")
        latent_size = latent_size or self.generation.latent_size
        num_pixels = latent_size[0] * latent_size[1] * self.generation.first_stage.down_factor**2
        own = self._sampler(sampler, num_steps, image_guidance_scale)
        generation = replace(self.generation, sampler=own, latent_size=latent_size)
        if negative is not None:
            batch = {**batch, "negative": [negative] * len(batch["caption"])}
        with self._precision():
            return generation(
                batch,
                seed,
                guidance_scale,
                max(_PIXELS_AT_ONCE // num_pixels, 1),
            )

    def _latent_size(self, size: int | tuple[int, int] | None) -> tuple[int, int]:
        if size is None:
            return self.generation.latent_size
        width, height = (size, size) if isinstance(size, int) else size
        down_factor = self.generation.first_stage.down_factor
        levels = 2 ** sum(isinstance(module, Downsample) for module in self.generation.model.modules())
        for pixels in (width, height):
            if pixels < 1 or pixels % (down_factor * levels):
                raise ConfigError(
                    f"size={pixels} must be a multiple of {down_factor * levels}: the first stage divides by "
                    f"{down_factor}, the denoiser by {levels}"
                )
        return height // down_factor, width // down_factor

    def _sampler(self, name: str | None, num_steps: int | None, image_scale: float | None) -> Any:  # noqa: ANN401 a part
        node = self.cfg.sampler if name is None else _read_sampler(name)
        taken = read_signature(node["_target_"]).arguments
        own = {key: self.cfg.sampler[key] for key in _KEPT if key in self.cfg.sampler and key in taken}
        given = {} if num_steps is None else {"num_steps": num_steps}
        if image_scale is not None:
            given["guidance"] = {**own["guidance"], "image_scale": image_scale}
        return build(OmegaConf.create({"sampler": {**node, **own, **given}}).sampler)

    def _precision(self) -> AbstractContextManager[None]:
        precision = self.cfg.diffusion.precision or self.cfg.precision
        device = next(self.generation.model.parameters()).device.type
        if precision == "bf16-mixed" or (precision == "16-mixed" and device == "cuda"):
            return torch.autocast(device, torch.bfloat16 if precision == "bf16-mixed" else torch.float16)
        return nullcontext()


def _read_config(directory: Path) -> DictConfig:
    file = directory / "config.yaml"
    try:
        cfg = OmegaConf.load(file)
    except (OSError, UnicodeDecodeError, YAMLError, OmegaConfBaseException) as error:
        if not file.is_file():
            raise ConfigError(f"{directory} is no run: there is no {file}; give the output_dir of a run") from None
        raise ConfigError(f"{file} cannot be read: {' '.join(str(error).split())}") from error
    missing = {"model", "conditioner", "first_stage", "objective", "sampler", "data", "diffusion", "precision"} - {*cfg}
    if missing:
        raise ConfigError(f"{file} is not the config of a run: it has no {', '.join(sorted(missing))}")
    return cfg


def _read_sampler(name: str) -> DictConfig:
    names = sorted(path.stem for path in (config_directory() / "sampler").glob("*.yaml"))
    if name not in names:
        raise ConfigError(f"there is no sampler {name!r}{nearest(name, names)}; there are {', '.join(names)}")
    with initialize_config_dir(str(config_directory()), version_base="1.3"):
        return compose(f"sampler/{name}").sampler


def _load_learned(parts: nn.ModuleDict, checkpoint: Path, weights: str | Path) -> None:
    """The checkpoint's weights, and over them the averages of those that have one."""
    try:
        parts.load_state_dict(read_checkpoint(checkpoint, {"ema": True, "raw": False}.get(weights, weights)))
    except RuntimeError as error:
        first = str(error).splitlines()[1].strip()
        raise ConfigError(f"{checkpoint} does not fit the config.yaml of its run: {first}") from error


def _load_frozen(directory: Path, cfg: DictConfig) -> nn.Module:
    """The first stage that stage 2 was trained on, proven by its hash: the run's own, or the weights it named."""
    first_stage = build(cfg.first_stage)
    if not list(first_stage.parameters()):
        return first_stage
    pinned, own = Manifest.load(directory / "diffusion" / "first_stage.json"), directory / "autoencoder"
    is_own = (own / "manifest.json").is_file() and Manifest.load(
        own / "manifest.json"
    ).weight_hash == pinned.weight_hash
    load_first_stage(first_stage, str(own) if is_own else cfg.first_stage.get("weights") or str(own))
    pinned.apply(first_stage)
    return first_stage


def _no_tokenizer(directory: Path) -> NoReturn:
    raise ConfigError(f"{directory / 'diffusion' / 'tokenizer'} is missing; copy the run directory whole")
