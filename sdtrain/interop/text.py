"""Text encoders and tokenizers as transformers saves them, under names that any of its versions reads."""

from __future__ import annotations

import copy
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from sdtrain.conditioner.t5 import T5
from sdtrain.conditioner.text_encoder import TextEncoder
from sdtrain.interop.choice import SD3, XL
from sdtrain.interop.folder import write_json

PLAIN, PROJECTED = "CLIPTextModel", "CLIPTextModelWithProjection"


def ending(number: int) -> str:
    """Of a component's name: text_encoder, text_encoder_2, text_encoder_3."""
    return "" if number == 1 else f"_{number}"


def encoder_class(pipeline: str, number: int, text: TextEncoder) -> str:
    """The class that the pipeline has as its text encoder of that number, from 1."""
    if isinstance(text, T5):
        return "T5EncoderModel"
    return PROJECTED if pipeline == SD3 or (pipeline == XL and number == 2) else PLAIN


def tokenizer_class(text: TextEncoder) -> str:
    """The class of its tokenizer, by the name that every version of transformers knows."""
    name = type(text.tokens.tokenizer).__name__
    return "PreTrainedTokenizerFast" if name == "TokenizersBackend" else name


def encoder_state(text: TextEncoder, kind: str) -> dict[str, Tensor]:
    """Its weights for that class. `text_model.` stands before CLIP's, as before transformers 5.6."""
    state = {name: tensor.detach().cpu().contiguous() for name, tensor in text.encoder.state_dict().items()}
    if kind == "T5EncoderModel":
        state.pop("encoder.embed_tokens.weight", None)  # tied to `shared`, which safetensors holds once
        return state
    projection = state.pop("text_projection.weight", None)
    state = {f"text_model.{name.removeprefix('text_model.')}": tensor for name, tensor in state.items()}
    if text.layer == "penultimate_norm":
        unread = f"text_model.encoder.layers.{text.encoder.config.num_hidden_layers - 1}."
        state = {name: tensor for name, tensor in state.items() if not name.startswith(unread)}
    if kind == PROJECTED:
        width = text.encoder.config.hidden_size
        state["text_projection.weight"] = torch.eye(width) if projection is None else projection
    return state


def encoder_config(text: TextEncoder, kind: str) -> dict[str, Any]:
    """Its config.json for that class."""
    values = json.loads(text.encoder.config.to_json_string()) | {"architectures": [kind]}
    if kind == "T5EncoderModel":
        return values | {"model_type": "t5", "is_encoder_decoder": True}
    config = text.encoder.config
    values |= {"model_type": "clip_text_model", "num_hidden_layers": config.num_hidden_layers}
    if text.layer == "penultimate_norm":
        values["num_hidden_layers"] -= 1
    if kind == PROJECTED and not hasattr(text.encoder, "text_projection"):
        values["projection_dim"] = config.hidden_size
    return values


def write_encoder(folder: Path, text: TextEncoder, kind: str, variant: str = "") -> None:
    """config.json and model.safetensors, or those of a variant."""
    write_json(folder / "config.json", encoder_config(text, kind))
    save_file(encoder_state(text, kind), folder / f"model{variant}.safetensors", metadata={"format": "pt"})


def write_tokenizer(folder: Path, text: TextEncoder) -> None:
    """The tokenizer, with the length that its pipeline pads to."""
    tokenizer = copy.deepcopy(text.tokens.tokenizer)
    tokenizer.model_max_length = text.tokens.max_tokens
    tokenizer.save_pretrained(folder)
    path = folder / "tokenizer_config.json"
    values: Mapping[str, Any] = json.loads(path.read_text())
    write_json(path, {**values, "tokenizer_class": tokenizer_class(text)})
