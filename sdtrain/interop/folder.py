"""Parts of a diffusers folder: a config.json and a safetensors file each."""

from __future__ import annotations

import inspect
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf
from torch import nn

WEIGHTS = "diffusion_pytorch_model.safetensors"
VERSION = "0.35.0"  # of diffusers, whose config keys are written; below 0.9.0 a pipeline changes sample_size
_CLASSES = {"UNet": "UNet2DConditionModel", "MMDiT": "SD3Transformer2DModel"}
_OURS = {"gradient_checkpointing"}  # how it is trained
# What our networks are without saying so. Written out: diffusers' defaults are not what its models were made with.
_SAID = {
    "UNet2DConditionModel": {
        "act_fn": "silu",
        "center_input_sample": False,
        "downsample_padding": 1,
        "flip_sin_to_cos": True,
        "freq_shift": 0,
        "mid_block_scale_factor": 1,
    },
    "AutoencoderKL": {"act_fn": "silu"},
    "VQModel": {"act_fn": "silu"},
}
# What UNet2DModel, the U-Net of LDMPipeline, has of the keys of UNet2DConditionModel.
_UNCONDITIONAL = (
    *(
        "in_channels",
        "out_channels",
        "block_out_channels",
        "layers_per_block",
        "norm_num_groups",
        "norm_eps",
        "dropout",
    ),
    *("down_block_types", "mid_block_type", "up_block_types", "flip_sin_to_cos", "freq_shift", "act_fn"),
    *("center_input_sample", "downsample_padding", "mid_block_scale_factor", "sample_size"),
)


def network_config(network: nn.Module, node: DictConfig, **more: Any) -> dict[str, Any]:
    """The content of a network's config.json: every argument of its constructor, as given or by default, whose names
    are diffusers' own.

    Args:
        node: what it was built from.
        more: what the constructor does not take (sample_size, scaling_factor).
    """
    given = OmegaConf.to_container(node, resolve=True)
    name = _CLASSES.get(type(network).__name__, type(network).__name__)
    values = {"_class_name": name, "_diffusers_version": VERSION} | _SAID.get(name, {})
    for key, parameter in inspect.signature(type(network)).parameters.items():
        if key not in _OURS:
            values[key] = given.get(key, parameter.default)
    if name in ("AutoencoderKL", "VQModel"):
        levels = len(values["block_out_channels"])
        values |= {
            "down_block_types": ["DownEncoderBlock2D"] * levels,
            "up_block_types": ["UpDecoderBlock2D"] * levels,
        }
    return values | more


def unconditional_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """A U-Net's config.json as UNet2DModel's: the same convolutions, without a condition."""
    values = {key: config[key] for key in _UNCONDITIONAL if key in config}
    return values | {"_class_name": "UNet2DModel", "_diffusers_version": VERSION}


def read_config(path: Path) -> dict[str, Any]:
    """A config.json, UNet2DModel's as that of the U-Net it is among ours: then `_is_partial` says that a key which is
    absent has no value, instead of the default one.
    """
    config = json.loads(path.read_text())
    if config.get("_class_name") != "UNet2DModel":
        return config
    values = {key: config[key] for key in _UNCONDITIONAL if key in config}
    ours = {"_class_name": _CLASSES["UNet"], "_is_partial": True, "cross_attention_dim": None}
    return {"mid_block_type": "UNetMidBlock2D"} | values | ours


def write_json(path: Path, values: Mapping[str, Any]) -> None:
    """As diffusers and transformers write their configs: sorted, indented by two."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(values, indent=2, sort_keys=True) + "\n")
