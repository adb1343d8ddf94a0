"""Weights in and out: our run directories, diffusers folders, single safetensors files."""

from __future__ import annotations

import json
from pathlib import Path

from omegaconf import DictConfig, OmegaConf
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn

from sdtrain.errors import ConfigError

WEIGHTS = "diffusion_pytorch_model.safetensors"


def save_first_stage(first_stage: nn.Module, node: DictConfig, directory: Path) -> None:
    """Writes DIR/vae as diffusers would: config.json and one safetensors file."""
    folder = directory / "vae"
    folder.mkdir(parents=True, exist_ok=True)
    state = {name: tensor.detach().cpu().contiguous() for name, tensor in first_stage.state_dict().items()}
    part = folder / (WEIGHTS + ".tmp")
    save_file(state, part, metadata={"format": "pt"})
    part.replace(folder / WEIGHTS)
    values = {k: v for k, v in OmegaConf.to_container(node, resolve=True).items() if k not in ("_target_", "weights")}
    levels = len(values["block_out_channels"])
    values |= {"_class_name": "AutoencoderKL", "act_fn": "silu"}
    values |= {"down_block_types": ["DownEncoderBlock2D"] * levels, "up_block_types": ["UpDecoderBlock2D"] * levels}
    (folder / "config.json").write_text(json.dumps(values, indent=2))


def find(path: str, key: str, subfolders: tuple[str, ...]) -> Path:
    """The safetensors file that a path means: itself, or in a folder, or in one of its subfolders.

    Raises:
        ConfigError: naming what was looked for.
    """
    place = Path(path).expanduser()
    if place.is_file():
        return place
    if not place.exists():
        raise ConfigError(f"{key}: no file or folder {path}")
    for folder in (place, *(place / name for name in subfolders)):
        for file in (folder / WEIGHTS, folder / "model.safetensors"):
            if file.is_file():
                return file
    raise ConfigError(f"{key}: {path} holds no {WEIGHTS}, neither itself nor in {', '.join(subfolders)}")


def load_strictly(module: nn.Module, file: Path, key: str) -> None:
    """Every name and shape must fit.

    Raises:
        ConfigError: with the first that does not.
    """
    try:
        state = load_file(file)
    except (SafetensorError, OSError) as error:
        raise ConfigError(f"{key}: {file} is no safetensors file: {error}") from error
    own = module.state_dict()
    for name in sorted(own.keys() | state.keys()):
        ours, theirs = (tuple(s[name].shape) if name in s else None for s in (own, state))
        if ours != theirs:
            raise ConfigError(
                f"{key}: {file} does not fit the configured part: {name} is {theirs} there and {ours} here"
            )
    module.load_state_dict(state)


def load_first_stage(first_stage: nn.Module, path: str) -> Path | None:
    """Loads the weights; returns the manifest that came with them, or None for weights from elsewhere."""
    place = Path(path).expanduser()
    load_strictly(first_stage, find(path, "first_stage.weights", ("vae", "autoencoder/vae")), "first_stage.weights")
    for manifest in (place / "manifest.json", place / "autoencoder" / "manifest.json"):
        if manifest.is_file():
            return manifest
    return None


def load_model(model: nn.Module, path: str) -> None:
    """Loads a denoiser to start from: a diffusers folder, its `unet` or `transformer`, or a file."""
    load_strictly(model, find(path, "model.weights", ("unet", "transformer")), "model.weights")
