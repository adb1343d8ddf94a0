"""Parameter names of single-file checkpoints (those of CompVis' latent-diffusion), against ours, which are diffusers'.

One table for the U-Net and one for the VAE, made from the names a network has, so they hold for any number of levels
and serve both ways. OpenCLIP's text encoder has tensors of another shape, too.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

from sdtrain.errors import ConfigError

_UNET = {
    "conv_in": "input_blocks.0.0",
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "class_embedding.linear_1": "label_emb.0.0",
    "class_embedding.linear_2": "label_emb.0.2",
    "class_embedding": "label_emb",
    "add_embedding.linear_1": "label_emb.0.0",
    "add_embedding.linear_2": "label_emb.0.2",
    "mid_block.resnets.0": "middle_block.0",
    "mid_block.attentions.0": "middle_block.1",
    "mid_block.resnets.1": "middle_block.2",
    "conv_norm_out": "out.0",
    "conv_out": "out.2",
}
_UNET_RESNET = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "time_emb_proj": "emb_layers.1",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "conv_shortcut": "skip_connection",
}
_VAE = {
    "quant_conv": "quant_conv",
    "post_quant_conv": "post_quant_conv",
    **{
        f"{side}.{ours}": f"{side}.{theirs}"
        for side in ("encoder", "decoder")
        for ours, theirs in {
            "conv_in": "conv_in",
            "mid_block.resnets.0": "mid.block_1",
            "mid_block.attentions.0": "mid.attn_1",
            "mid_block.resnets.1": "mid.block_2",
            "conv_norm_out": "norm_out",
            "conv_out": "conv_out",
        }.items()
    },
}
_VAE_PARTS = {
    "conv_shortcut": "nin_shortcut",
    "group_norm": "norm",
    "to_q": "q",
    "to_k": "k",
    "to_v": "v",
    "to_out.0": "proj_out",
}
_LEGACY_VAE = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}
_OPEN_CLIP = {
    "embeddings.token_embedding.weight": "token_embedding.weight",
    "embeddings.position_embedding.weight": "positional_embedding",
    "final_layer_norm": "ln_final",
    "encoder.layers": "transformer.resblocks",
    "layer_norm1": "ln_1",
    "layer_norm2": "ln_2",
    "mlp.fc1": "mlp.c_fc",
    "mlp.fc2": "mlp.c_proj",
    "self_attn.out_proj": "attn.out_proj",
}


def unet_names(names: Iterable[str]) -> dict[str, str]:
    """Our name -> the single file's, for all names of a U-Net.

    Raises:
        ConfigError: for a name that single files have no counterpart of.
    """
    names = list(names)
    modules, table, place = _modules(names), dict(_UNET), 1
    for i in range(_count(modules, "down_blocks")):
        for j in range(_count(modules, f"down_blocks.{i}.resnets")):
            table[f"down_blocks.{i}.resnets.{j}"] = f"input_blocks.{place}.0"
            table[f"down_blocks.{i}.attentions.{j}"] = f"input_blocks.{place}.1"
            place += 1
        if f"down_blocks.{i}.downsamplers" in modules:
            table[f"down_blocks.{i}.downsamplers.0.conv"] = f"input_blocks.{place}.0.op"
            place += 1
    place = 0
    for i in range(_count(modules, "up_blocks")):
        for j in range(_count(modules, f"up_blocks.{i}.resnets")):
            table[f"up_blocks.{i}.resnets.{j}"] = f"output_blocks.{place}.0"
            table[f"up_blocks.{i}.attentions.{j}"] = f"output_blocks.{place}.1"
            place += 1
        seat = 2 if f"up_blocks.{i}.attentions" in modules else 1
        table[f"up_blocks.{i}.upsamplers.0.conv"] = f"output_blocks.{place - 1}.{seat}.conv"
    return {name: _rename(name, table, _UNET_RESNET) for name in names}


def vae_names(names: Iterable[str]) -> dict[str, str]:
    """Our name -> the single file's, for all names of an autoencoder.

    Raises:
        ConfigError: for a name that single files have no counterpart of.
    """
    names = list(names)
    modules, table = _modules(names), dict(_VAE)
    num_levels = _count(modules, "decoder.up_blocks")
    for i in range(num_levels):
        up = f"decoder.up.{num_levels - 1 - i}"  # counted from full resolution there
        table[f"encoder.down_blocks.{i}.downsamplers.0.conv"] = f"encoder.down.{i}.downsample.conv"
        table[f"decoder.up_blocks.{i}.upsamplers.0.conv"] = f"{up}.upsample.conv"
        for j in range(_count(modules, f"encoder.down_blocks.{i}.resnets")):
            table[f"encoder.down_blocks.{i}.resnets.{j}"] = f"encoder.down.{i}.block.{j}"
        for j in range(_count(modules, f"decoder.up_blocks.{i}.resnets")):
            table[f"decoder.up_blocks.{i}.resnets.{j}"] = f"{up}.block.{j}"
    return {name: _rename(name, table, _VAE_PARTS) for name in names}


def modern_vae_name(name: str) -> str:
    """The name that diffusers gives today to a parameter of a VAE that it saved before version 0.15."""
    head, _, last = name.rpartition(".attentions.0.")
    part, _, leaf = last.rpartition(".")
    return f"{head}.attentions.0.{_LEGACY_VAE[part]}.{leaf}" if part in _LEGACY_VAE else name


def to_open_clip(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A text encoder as transformers names it (with `text_model.`) -> as OpenCLIP does: query, key and value fused."""
    found = {}
    for name, tensor in state.items():
        if name == "text_projection.weight":
            found["text_projection"] = tensor.T.contiguous()
        elif ".self_attn.q_proj." in name:
            fused = torch.cat([state[name.replace("q_proj", f"{letter}_proj")] for letter in "qkv"])
            found[_open_clip_name(name.replace("self_attn.q_proj.", "attn.in_proj_"))] = fused
        elif not any(f".self_attn.{letter}_proj." in name for letter in "kv"):
            found[_open_clip_name(name)] = tensor
    return found


def from_open_clip(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The inverse of `to_open_clip`. What training alone reads (`logit_scale`, `attn_mask`) is left out."""
    found = {}
    for name, tensor in state.items():
        if name in ("logit_scale", "attn_mask"):
            continue
        if name == "text_projection":
            found["text_projection.weight"] = tensor.T.contiguous()
            continue
        ours = "text_model." + name
        for new, old in _OPEN_CLIP.items():
            ours = ours.replace(old, new)
        if ".attn.in_proj_" in ours:
            for letter, part in zip("qkv", tensor.chunk(3)):
                found[ours.replace("attn.in_proj_", f"self_attn.{letter}_proj.")] = part.contiguous()
        else:
            found[ours] = tensor
    return found


def _open_clip_name(name: str) -> str:
    name = name.removeprefix("text_model.")
    for ours, theirs in _OPEN_CLIP.items():
        name = name.replace(ours, theirs)
    return name


def _modules(names: Iterable[str]) -> set[str]:
    """Every prefix of every name."""
    return {".".join(words[:n]) for words in (name.split(".") for name in names) for n in range(1, len(words))}


def _count(modules: set[str], of: str) -> int:
    number = 0
    while f"{of}.{number}" in modules:
        number += 1
    return number


def _rename(name: str, table: Mapping[str, str], parts: Mapping[str, str]) -> str:
    """The longest prefix of a name that the table knows, replaced; then the part within a block."""
    words = name.split(".")
    for n in range(len(words) - 1, 0, -1):
        head, rest = ".".join(words[:n]), ".".join(words[n:])
        if head in table:
            part = next((part for part in parts if rest.startswith(part + ".")), "")
            return f"{table[head]}.{parts.get(part, '')}{rest.removeprefix(part)}"
    raise ConfigError(f"a single file has no name for the parameter {name}")
