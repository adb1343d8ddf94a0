"""A run of ours as a folder that diffusers loads: written, read again, compared, and only then given its name."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import Tensor, nn

from sdtrain.checkpoint.commit import newest_valid
from sdtrain.checkpoint.files import EMA
from sdtrain.errors import ConfigError
from sdtrain.first_stage.manifest import weight_hash
from sdtrain.first_stage.vq import VQModel
from sdtrain.interop.choice import EDIT, LDM, SD3, UPSCALE, XL, Choice, choose
from sdtrain.interop.folder import VERSION, WEIGHTS, network_config, unconditional_config, write_json
from sdtrain.interop.pipeline import Pipeline
from sdtrain.interop.scheduler import differs, low_resolution_config, scheduler_config
from sdtrain.interop.text import encoder_class, ending, tokenizer_class, write_encoder, write_tokenizer
from sdtrain.interop.verify import verify

RAW = ".non_ema"  # diffusers: from_pretrained(OUT, variant="non_ema")
_UPSCALE_FACTOR = 0.08333  # StableDiffusionUpscalePipeline overwrites any other


@dataclass(frozen=True)
class Latents:
    """How a pipeline gets from the denoiser's latents to the autoencoder's: its state and the keys of its config."""

    state: dict[str, Tensor]
    config: dict[str, Any]


def export(run: str | Path, out: str | Path) -> list[str]:
    """Writes the newest valid checkpoint of a run, the averaged weights and the raw ones as the variant `non_ema`;
    returns what their user must know.

    Raises:
        ConfigError: where no pipeline of diffusers expresses the run, with the reason, or OUT is taken, or what was
            written is not what was meant.
    """
    directory = Path(out).expanduser()
    if directory.exists() and (not directory.is_dir() or any(directory.iterdir())):
        raise ConfigError(f"{directory} is there already; export into a new folder")
    pipe = Pipeline.load(run, "ema", "cpu")
    is_averaged = (newest_valid(Path(run).expanduser() / "diffusion" / "checkpoints")[0] / EMA).is_file()
    return write(pipe, Pipeline.load(run, "raw", "cpu") if is_averaged else None, directory)


def write(pipe: Pipeline, raw: Pipeline | None, directory: Path) -> list[str]:
    """The same of a run that is loaded."""
    config = network_config(pipe.generation.model, pipe.cfg.model)
    choice = choose(pipe.generation, config)
    if choice.pipeline != SD3:  # an MMDiT has its own, which its positions are counted on
        config["sample_size"] = pipe.generation.latent_size[0]
    if choice.pipeline == LDM:
        config = unconditional_config(config)
    part = directory.with_name(directory.name + ".tmp")
    shutil.rmtree(part, ignore_errors=True)
    try:
        _write_parts(part, pipe, choice, config)
        if raw is not None:
            trained = choose(raw.generation, network_config(raw.generation.model, raw.cfg.model))
            _write_network(part / choice.denoiser, config, raw.generation.model.state_dict(), RAW)
            if any(text.trained for text in trained.texts):
                _write_texts(part, trained, RAW)
        notes = verify(part, pipe, choice)
        scheduler = scheduler_config(pipe.generation.objective, pipe.generation.sampler, choice.pipeline == SD3)
        if other := differs(scheduler, pipe.generation.sampler):
            notes.append(other)
        if directory.is_dir():
            directory.rmdir()
        part.replace(directory)
    except OSError as error:
        raise ConfigError(f"cannot write {directory}: {error.strerror or error}") from error
    finally:
        shutil.rmtree(part, ignore_errors=True)
    return notes


def _write_parts(part: Path, pipe: Pipeline, choice: Choice, config: dict[str, Any]) -> None:
    parts = pipe.generation
    scheduler = scheduler_config(parts.objective, parts.sampler, choice.pipeline == SD3)
    latents, side = fold(parts.first_stage, choice.pipeline), parts.latent_size[0]
    vae = network_config(parts.first_stage, pipe.cfg.first_stage, **latents.config)
    vae["sample_size"] = side * parts.first_stage.down_factor
    classes = (values["_class_name"] for values in (scheduler, vae, config))
    write_json(part / "model_index.json", model_index(choice, *classes))
    write_json(part / "scheduler" / "scheduler_config.json", scheduler)
    if choice.low_resolution is not None:
        low = low_resolution_config(choice.low_resolution.path)
        write_json(part / "low_res_scheduler" / "scheduler_config.json", low)
    _write_network(part / choice.denoiser, config, parts.model.state_dict())
    _write_network(part / choice.vae, vae, latents.state)
    _write_texts(part, choice)
    write_json(part / "sdtrain.json", {"run": pipe.cfg.name, "first_stage": weight_hash(parts.first_stage)})


def fold(first_stage: nn.Module, pipeline: str) -> Latents:
    """What a pipeline that decodes `latents / scaling_factor` needs so that it decodes as `decode(unwhiten(latents))`.

    One scale for all channels stays a number; SD3's pipeline has a shift beside it. Everything else is folded into the
    convolutions around the latents.

    Raises:
        ConfigError: where there are none to fold it into.
    """
    scale, shift = first_stage.scale, first_stage.shift
    is_plain = len({*scale}) == 1 and len({*shift}) == 1 and (shift[0] == 0 or pipeline == SD3)
    if is_plain and pipeline not in (UPSCALE, EDIT):
        return Latents(
            {name: tensor.detach() for name, tensor in first_stage.state_dict().items()},
            _scale(first_stage, scale[0], shift[0]),
        )
    if not (first_stage.quant_conv and first_stage.post_quant_conv):
        raise ConfigError(
            f"{pipeline} knows one scaling_factor{' and shift_factor' * (pipeline == SD3)} for all channels; this "
            "run's first stage is whitened otherwise, and has no quant_conv and post_quant_conv to fold that into"
        )
    factor = _UPSCALE_FACTOR if pipeline == UPSCALE else 1.0
    first_stage.scale = [value / factor for value in scale]
    try:
        return Latents(first_stage.folded_state(), _scale(first_stage, factor, 0.0))
    finally:
        first_stage.scale = scale


def _scale(first_stage: nn.Module, factor: float, shift: float) -> dict[str, Any]:
    if isinstance(first_stage, VQModel):
        return {"scaling_factor": factor}
    return {"scaling_factor": factor, "shift_factor": shift, "latents_mean": None, "latents_std": None}


def model_index(choice: Choice, scheduler: str, first_stage: str, denoiser: str) -> dict[str, Any]:
    """The components by their classes."""
    name = choice.pipeline
    values: dict[str, Any] = {
        "_class_name": name,
        "_diffusers_version": VERSION,
        "scheduler": ["diffusers", scheduler],
        choice.vae: ["diffusers", first_stage],
        choice.denoiser: ["diffusers", denoiser],
    }
    for number, text in enumerate(choice.texts, 1):
        kinds: tuple[str | None, str | None] = (None, None)  # SD3 may leave out T5, with zeros in its place
        if text.tokens is not None:
            kinds = encoder_class(name, number, text), tokenizer_class(text)
        for component, kind in zip(("text_encoder", "tokenizer"), kinds):
            values[component + ending(number)] = ["transformers" if kind else None, kind]
    optional = {"feature_extractor": [None, None], "image_encoder": [None, None]}
    checker = {"safety_checker": [None, None]}
    if name == UPSCALE:
        values |= checker | {"watermarker": [None, None], "feature_extractor": [None, None]}
        values |= {"low_res_scheduler": ["diffusers", "DDPMScheduler"]}
        return values | {"max_noise_level": choice.low_resolution.max_noise_level}
    if name == XL:
        are_zeros = choice.texts[0].empty_caption == "zeros"
        return values | optional | {"force_zeros_for_empty_prompt": are_zeros, "add_watermarker": False}
    if name == SD3:
        return values | optional
    return values | optional | checker | {"requires_safety_checker": False}


def _write_network(folder: Path, config: Mapping[str, Any], state: Mapping[str, Tensor], variant: str = "") -> None:
    write_json(folder / "config.json", config)
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in state.items()}
    save_file(tensors, folder / WEIGHTS.replace(".safetensors", variant + ".safetensors"), metadata={"format": "pt"})


def _write_texts(part: Path, choice: Choice, variant: str = "") -> None:
    for number, text in enumerate(choice.texts, 1):
        if text.tokens is None:
            continue
        kind = encoder_class(choice.pipeline, number, text)
        write_encoder(part / f"text_encoder{ending(number)}", text, kind, variant)
        if not variant:
            write_tokenizer(part / f"tokenizer{ending(number)}", text)
