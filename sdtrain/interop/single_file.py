"""One safetensors file with a whole model under the names of latent-diffusion, as ComfyUI, A1111 and diffusers'
`from_single_file` read it.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from sdtrain.errors import ConfigError
from sdtrain.interop.names import from_open_clip, modern_vae_name, to_open_clip, unet_names, vae_names

PREFIXES = {"unet": "model.diffusion_model.", "vae": "first_stage_model."}
_CLIP, _OPEN_CLIP = "transformer.", "model."


def find_part(names: Iterable[str], part: str) -> list[str]:
    """The names of a part ("unet" or "vae") in a file; all of them where it is not a whole model's."""
    names = list(names)
    within = [name for name in names if name.startswith(PREFIXES[part])]
    return within or names


def names_of(theirs: Iterable[str], own: Iterable[str], part: str) -> dict[str, str]:
    """Their name -> ours. A name that nothing corresponds to stays, to be refused by who loads it.

    Args:
        theirs: as `find_part` gives them: of a single file, of a diffusers folder of any age, or of a part alone under
            latent-diffusion's names.
        own: the names that the part has here.
    """
    theirs, prefix = list(theirs), PREFIXES[part]
    stems = {name: name.removeprefix(prefix) for name in theirs}
    first = {"unet": "input_blocks.", "vae": "encoder.down."}[part]
    if any(stem.startswith(first) for stem in stems.values()):
        table = {old: ours for ours, old in (unet_names(own) if part == "unet" else vae_names(own)).items()}
        return {name: table.get(stem, stem) for name, stem in stems.items()}
    return {name: modern_vae_name(name) if part == "vae" else name for name in theirs}


def pack(parts: Mapping[str, Mapping[str, Tensor]], open_clip: Mapping[str, bool]) -> dict[str, Tensor]:
    """The parts of a diffusers folder by name (unet, vae, text_encoder, text_encoder_2) -> a single file's tensors.

    Args:
        open_clip: for each text encoder, whether OpenCLIP made its kind, as in SD 2 and in SDXL's second.

    Raises:
        ConfigError: for a parameter that single files have no name for.
    """
    found: dict[str, Tensor] = {}
    for part, table in (("unet", unet_names), ("vae", vae_names)):
        names = table(parts[part])
        for ours, tensor in parts[part].items():
            is_projection = part == "vae" and ".mid.attn_1." in names[ours] and tensor.dim() == 2
            found[PREFIXES[part] + names[ours]] = tensor[:, :, None, None] if is_projection else tensor
    for part, prefix in _text_prefixes(parts).items():
        if open_clip[part]:
            found |= {prefix + _OPEN_CLIP + name: tensor for name, tensor in to_open_clip(parts[part]).items()}
        else:
            found |= {prefix + _CLIP + name: tensor for name, tensor in parts[part].items()}
    return {name: tensor.contiguous() for name, tensor in found.items()}


def unpack(state: Mapping[str, Tensor], own: Mapping[str, Iterable[str]]) -> dict[str, dict[str, Tensor]]:
    """The inverse of `pack`.

    Args:
        own: the names of each part, as they are to be found.
    """
    found: dict[str, dict[str, Tensor]] = {}
    for part in PREFIXES:
        theirs = [name for name in state if name.startswith(PREFIXES[part])]
        found[part] = {ours: state[name] for name, ours in names_of(theirs, own[part], part).items()}
    for name, tensor in found["vae"].items():
        if ".mid_block.attentions." in name and tensor.dim() == 4:
            found["vae"][name] = tensor.flatten(1)
    for part, prefix in _text_prefixes(own).items():
        within = {name.removeprefix(prefix): tensor for name, tensor in state.items() if name.startswith(prefix)}
        fused = {name.removeprefix(_OPEN_CLIP): t for name, t in within.items() if name.startswith(_OPEN_CLIP)}
        plain = {name.removeprefix(_CLIP): t for name, t in within.items() if name.startswith(_CLIP)}
        found[part] = from_open_clip(fused) if fused else plain
    return found


def write_single_file(folder: Path, file: Path, title: str) -> str | None:
    """An exported diffusers folder as one file; read again and compared. Returns what its user must know, or None.

    Raises:
        ConfigError: where the folder holds what a single file cannot, or it cannot be written.
    """
    index = json.loads((folder / "model_index.json").read_text())
    if "unet" not in index or "vae" not in index or index["unet"][1] != "UNet2DConditionModel":
        raise ConfigError(f"a {index['_class_name']} has no place in a single file: its names are those of a U-Net's")
    names = [name for name in ("unet", "vae", "text_encoder", "text_encoder_2") if name in index]
    configs = {name: json.loads((folder / name / "config.json").read_text()) for name in names}
    parts = {
        name: load_file(folder / name / f"{'' if name.startswith('text') else 'diffusion_pytorch_'}model.safetensors")
        for name in names
    }
    open_clip = {name: configs[name]["hidden_act"] == "gelu" for name in names if name.startswith("text")}
    state = pack(parts, open_clip)
    scheduler = json.loads((folder / "scheduler" / "scheduler_config.json").read_text())
    kind = {"v_prediction": "v", "flow_prediction": "flow"}.get(scheduler["prediction_type"], "epsilon")
    flags = {"v_pred": kind == "v", "ztsnr": scheduler.get("rescale_betas_zero_snr", False)}
    side = configs["unet"]["sample_size"] * 2 ** (len(configs["vae"]["block_out_channels"]) - 1)
    family = "stable-diffusion-xl-v1-base" if "text_encoder_2" in names else "stable-diffusion-v1"
    metadata = {
        "format": "pt",
        "modelspec.sai_model_spec": "1.0.1",
        "modelspec.architecture": "stable-diffusion-v2" if any(open_clip.values()) and len(open_clip) == 1 else family,
        "modelspec.implementation": "diffusers",
        "modelspec.title": title,
        "modelspec.resolution": f"{side}x{side}",
        "modelspec.prediction_type": kind,
        "sdtrain.vae": json.dumps({key: configs["vae"][key] for key in ("scaling_factor", "shift_factor")}),
    }
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        save_file(state | {name: torch.zeros(0) for name, is_set in flags.items() if is_set}, file, metadata=metadata)
    except OSError as error:
        raise ConfigError(f"cannot write {file}: {error.strerror or error}") from error
    _require_equal(parts, unpack(load_file(file), parts), file)
    if configs["unet"]["block_out_channels"][0] == 320:
        return None
    return f"its sizes are its own: diffusers reads it with config={folder}; ComfyUI and A1111 know Stable Diffusion's"


def _require_equal(
    ours: Mapping[str, Mapping[str, Tensor]], read: Mapping[str, Mapping[str, Tensor]], file: Path
) -> None:
    for part, tensors in ours.items():
        for name in sorted(tensors.keys() | read[part].keys()):
            if name not in tensors or name not in read[part] or not torch.equal(tensors[name], read[part][name]):
                raise ConfigError(f"{file} was not written right: {part} {name}")


def _text_prefixes(parts: Iterable[str]) -> dict[str, str]:
    """Where text encoders stand: one is Stable Diffusion 1's or 2's, two are XL's."""
    names = [name for name in parts if name.startswith("text_encoder")]
    if len(names) < 2:
        return dict.fromkeys(names, "cond_stage_model.")
    return {name: f"conditioner.embedders.{number}." for number, name in enumerate(sorted(names))}
