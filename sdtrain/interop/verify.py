"""What an export wrote, read again: by our own networks, and by diffusers where it is installed."""

from __future__ import annotations

import importlib
import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
import transformers
from torch import Tensor, nn

from sdtrain.conditioner.image import SourceImage
from sdtrain.errors import ConfigError
from sdtrain.interop.choice import EDIT, INPAINT, LDM, SD3, XL, Choice
from sdtrain.interop.folder import WEIGHTS, read_config
from sdtrain.interop.pipeline import Pipeline
from sdtrain.interop.weights import load_strictly, read_state
from sdtrain.stage.generation import Generation

_PROMPTS = ["", "a big red star on a white background"]
_SIZE = (64, 64)
_TOLERANCE = 1e-3  # of the largest value; fp16 text encoders need it


@torch.no_grad()
def verify(folder: Path, pipe: Pipeline, choice: Choice) -> list[str]:
    """Reads an exported folder and compares it with the run; returns what its user must know.

    Raises:
        ConfigError: with the first key that is missing or unexpected, or the first part that says something else.
    """
    index = json.loads((folder / "model_index.json").read_text())
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        _verify_ours(folder, pipe.generation, choice)
        try:
            diffusers = importlib.import_module("diffusers")
        except ImportError:
            return ["diffusers is not installed here, so only our own reader has proven the folder"]
        with _quiet(diffusers.utils.logging, transformers.utils.logging):
            components = _load_components(folder, index)
            pipeline = getattr(diffusers, choice.pipeline).from_pretrained(folder, local_files_only=True, **components)
            _compare(pipeline, pipe.generation, choice)
    return _notes(choice, pipe.generation)


def _notes(choice: Choice, parts: Generation) -> list[str]:
    """What no file of the folder can say."""
    t5, notes = choice.texts[2] if choice.pipeline == SD3 else None, []
    scale, image_scale = parts.sampler.guidance.scale, parts.sampler.guidance.image_scale
    if choice.pipeline == EDIT:
        source = next(part for part in parts.conditioner.modules() if isinstance(part, SourceImage))
        wanted = 1.0 if source.dropout == 0 else scale if image_scale is None else image_scale
        notes.append(
            f"call the pipeline with guidance_scale={scale}, image_guidance_scale={wanted} to draw as this run"
        )
    if choice.pipeline == INPAINT:
        notes.append("it draws the masked picture's latents from their posterior, where this run takes their mean")
    if choice.low_resolution is not None:
        notes.append(f"call the pipeline with noise_level={choice.low_resolution.noise_level} to draw as this run")
    if t5 is not None and t5.tokens is None:
        notes.append("load it with text_encoder_3=None, tokenizer_3=None: it was trained without T5")
    if t5 is not None and t5.max_tokens != 256:
        notes.append(f"call the pipeline with max_sequence_length={t5.max_tokens}, as it was trained")
    return notes


def _verify_ours(folder: Path, parts: Generation, choice: Choice) -> None:
    model = _read(folder / choice.denoiser, type(parts.model), "unet")
    for key, tensor in parts.model.state_dict().items():
        if not torch.equal(model.state_dict()[key], tensor.cpu()):
            raise ConfigError(f"export: {folder / choice.denoiser} was not written right: {key}")
    first_stage = _read(folder / choice.vae, type(parts.first_stage), "vae")
    latent = torch.randn(1, first_stage.latent_channels, 8, 8)
    theirs = first_stage.decode(first_stage.unwhiten(latent))
    _require_close("the decoder", theirs, parts.first_stage.decode(parts.first_stage.unwhiten(latent)))


def _read(folder: Path, kind: type[nn.Module], part: str) -> nn.Module:
    """A network of ours from a folder, its variants first, so that it ends with the default weights."""
    network = kind.from_diffusers(read_config(folder / "config.json")).eval()
    for file in sorted(folder.glob("*.safetensors"), key=lambda file: file.name == WEIGHTS):
        load_strictly(network, read_state(file, network.state_dict(), part, "export"), file, "export")
    return network


def _load_components(folder: Path, index: dict[str, Any]) -> dict[str, Any]:
    """Every component with weights, loaded strictly: a pipeline itself would only warn."""
    found: dict[str, Any] = {}
    for name, entry in index.items():
        if name in ("text_encoder_3", "tokenizer_3") and entry[0] is None:
            found[name] = None  # SD3's pipeline takes that for an answer only from its caller
        if not isinstance(entry, list) or entry[0] is None or not (folder / name / "config.json").is_file():
            continue
        kind = getattr(importlib.import_module(entry[0]), entry[1])
        found[name], info = kind.from_pretrained(folder / name, local_files_only=True, output_loading_info=True)
        for what in ("missing_keys", "unexpected_keys", "mismatched_keys", "error_msgs"):
            for key in sorted(map(str, info.get(what) or ())):
                raise ConfigError(f"export: {entry[1]} finds {what.replace('_', ' ')} in {folder / name}: {key}")
    return found


def _compare(pipeline: Any, parts: Generation, choice: Choice) -> None:  # noqa: ANN401 a class of diffusers
    """Its text encoders, its denoiser and its decoder against ours."""
    vae = getattr(pipeline, choice.vae)
    latent = torch.randn(1, parts.first_stage.latent_channels, 8, 8)
    scaled = latent / vae.config.scaling_factor + (vae.config.get("shift_factor") or 0.0)
    ours = parts.first_stage.decode(parts.first_stage.unwhiten(latent))
    _require_close("the decoder of diffusers", vae.decode(scaled).sample, ours)
    cond: dict[str, Tensor] = {}
    if choice.texts:
        # A pipeline has zeros where it is given no text, and not for an empty one.
        captions = _PROMPTS[1:] if choice.texts[0].empty_caption == "zeros" else _PROMPTS
        asked = parts.conditioner if choice.pipeline in (XL, SD3) else choice.texts[0]
        cond = dict(asked({"caption": captions, "image_size": _SIZE}))
        for name, value in _encode(pipeline, choice, captions).items():
            _require_close(f"the text encoders of diffusers ({name})", value, cond[name])
    if choice.low_resolution is not None:
        cond["class_labels"] = torch.full((len(captions),), 20)
    network = getattr(pipeline, choice.denoiser)
    num = len(cond["context"]) if cond else 1
    x, time = torch.randn(num, network.config.in_channels, 16, 16), torch.full((num,), 500.0)
    _require_close("the denoiser of diffusers", _ask(network, x, time, cond, choice), parts.model(x, time, cond))


def _encode(pipeline: Any, choice: Choice, captions: list[str]) -> dict[str, Tensor]:  # noqa: ANN401
    """What the pipeline tells its denoiser of captions."""
    settings = {"device": torch.device("cpu"), "num_images_per_prompt": 1, "do_classifier_free_guidance": False}
    if choice.pipeline == SD3:
        length = choice.texts[2].max_tokens
        told = pipeline.encode_prompt(captions, captions, captions, max_sequence_length=length, **settings)
    elif choice.pipeline == XL:
        told = pipeline.encode_prompt(captions, captions, **settings)
    else:
        longest = {"padding": "max_length", "max_length": pipeline.tokenizer.model_max_length, "truncation": True}
        ids = pipeline.tokenizer(captions, return_tensors="pt", **longest).input_ids
        return {"context": pipeline.text_encoder(ids)[0]}
    return {"context": told[0], "pooled": told[2]}


def _ask(network: Any, x: Tensor, time: Tensor, cond: dict[str, Tensor], choice: Choice) -> Tensor:  # noqa: ANN401
    """The output of diffusers' denoiser."""
    if choice.pipeline == SD3:
        return network(x, cond["context"], cond["pooled"], time).sample
    if choice.pipeline == LDM:
        return network(x, time).sample
    added = {"text_embeds": cond["pooled"], "time_ids": cond["sizes"]} if choice.pipeline == XL else None
    labels = cond.get("class_labels")
    return network(x, time, cond["context"], class_labels=labels, added_cond_kwargs=added).sample


@contextmanager
def _quiet(*libraries: ModuleType) -> Iterator[None]:
    """Without progress bars and advice."""
    levels = [library.get_verbosity() for library in libraries]
    for library in libraries:
        library.set_verbosity_error()
        library.disable_progress_bar()
    try:
        yield
    finally:
        for library, level in zip(libraries, levels):
            library.set_verbosity(level)
            library.enable_progress_bar()


def _require_close(what: str, theirs: Tensor, ours: Tensor) -> None:
    error = float((theirs.float() - ours.float()).abs().max() / ours.float().abs().max().clamp(min=1e-6))
    if theirs.shape != ours.shape or not error <= _TOLERANCE:
        raise ConfigError(f"export: {what} says something else than ours, by {error:.1e} of the largest value")
