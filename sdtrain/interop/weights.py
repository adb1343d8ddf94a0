"""Weights in and out: our run directories, diffusers folders, single safetensors files."""

from __future__ import annotations

import inspect
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig, OmegaConf
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from sdtrain.checkpoint.commit import newest_valid
from sdtrain.checkpoint.files import EMA, MODEL
from sdtrain.errors import ConfigError
from sdtrain.first_stage.manifest import Manifest, weight_hash
from sdtrain.first_stage.whitening import scale_of
from sdtrain.interop.folder import WEIGHTS, network_config, read_config, write_json
from sdtrain.interop.single_file import PREFIXES, find_part, names_of

_VAE_FOLDERS = ("vae", "vqvae", "autoencoder/vae")
_FREE = {"dropout", "gradient_checkpointing", "sample_size"}  # how a network is used, not what it is


def save_first_stage(first_stage: nn.Module, node: DictConfig, directory: Path) -> None:
    """Writes DIR/vae as diffusers would: config.json and one safetensors file. Its scaling_factor is null, as its
    latents are not whitened there: that is the manifest's, or an export's.
    """
    folder = directory / "vae"
    folder.mkdir(parents=True, exist_ok=True)
    state = {name: tensor.detach().cpu().contiguous() for name, tensor in first_stage.state_dict().items()}
    part = folder / (WEIGHTS + ".tmp")
    save_file(state, part, metadata={"format": "pt"})
    part.replace(folder / WEIGHTS)
    write_json(folder / "config.json", network_config(first_stage, node, scaling_factor=None))


def find(path: str, key: str, subfolders: tuple[str, ...]) -> Path:
    """The file that a path means: itself, or in a folder, or in one of its subfolders; of a model in several files,
    their index.

    Raises:
        ConfigError: naming what was looked for.
    """
    place = Path(path).expanduser()
    if place.is_file():
        return place
    if not place.exists():
        raise ConfigError(f"{key}: no file or folder {path}")
    for folder in (place, *(place / name for name in subfolders)):
        for name in (WEIGHTS, WEIGHTS + ".index.json", "model.safetensors"):
            if (folder / name).is_file():
                return folder / name
    raise ConfigError(f"{key}: {path} holds no {WEIGHTS}, neither itself nor in {', '.join(subfolders)}")


def read_state(file: Path, own: Mapping[str, Tensor], part: str, key: str) -> dict[str, Tensor]:
    """The tensors of a part ("unet" or "vae") in a file of any layout, under the names that `own` has.

    What does not belong to the part is left out of a single file, and kept from any other.

    Raises:
        ConfigError: where it cannot be read.
    """
    try:
        if file.name.endswith(".index.json"):
            shards = sorted(set(json.loads(file.read_text())["weight_map"].values()))
            return {name: tensor for shard in shards for name, tensor in load_file(file.parent / shard).items()}
        with safe_open(file, "pt") as opened:
            names = names_of(find_part(opened.keys(), part), own, part)
            state = {ours: opened.get_tensor(name) for name, ours in names.items()}
        # latent-diffusion's attention in the autoencoder projects by 1x1 convolutions
        return {
            name: tensor.flatten(1) if name in own and tensor.shape[2:] == (1, 1) and own[name].dim() == 2 else tensor
            for name, tensor in state.items()
        }
    except (SafetensorError, OSError, ValueError, KeyError) as error:
        raise ConfigError(f"{key}: {file} is no safetensors file: {error}") from error


def load_strictly(module: nn.Module, state: Mapping[str, Tensor], source: Path, key: str) -> None:
    """Every name and shape must fit.

    Raises:
        ConfigError: with the first that does not.
    """
    own = module.state_dict()
    for name in sorted(own.keys() | state.keys()):
        ours, theirs = (tuple(s[name].shape) if name in s else None for s in (own, state))
        if ours != theirs:
            raise ConfigError(
                f"{key}: {source} does not fit the configured part: {name} is {theirs} there and {ours} here"
            )
    module.load_state_dict(state)


def load_first_stage(first_stage: nn.Module, path: str, node: DictConfig | None = None) -> Path | None:
    """Loads the weights; returns the manifest that came with them, or None for weights from elsewhere.

    Args:
        node: what the first stage was built from, to be held against the config.json of a diffusers folder.
    """
    place, key = Path(path).expanduser(), "first_stage.weights"
    file = find(path, key, _VAE_FOLDERS)
    require_config(first_stage, node, _config_beside(file), file, "first_stage")
    load_strictly(first_stage, read_state(file, first_stage.state_dict(), "vae", key), file, key)
    for folder in (place, place / "autoencoder", file.parent.parent):
        if (folder / "manifest.json").is_file():
            return folder / "manifest.json"
    return None


def own_whitening(first_stage: nn.Module, path: str, image_size: int) -> Manifest | None:
    """The manifest of a loaded first stage that brings its scale and shift, which its denoiser was trained on; None for
    one that says nothing of them: they are measured.
    """
    file = find(path, "first_stage.weights", _VAE_FOLDERS)
    config, channels = _config_beside(file) or _config_within(file), first_stage.latent_channels
    if config.get("scaling_factor", 0.0) is None:
        return None
    shift, scale = scale_of(config, channels)
    exactly = [0.0] * channels
    return Manifest(
        weight_hash=weight_hash(first_stage),
        down_factor=first_stage.down_factor,
        latent_channels=channels,
        image_size=image_size,
        latent_mean=shift,
        latent_std=[1.0 / value for value in scale],
        latent_mean_confidence=exactly,
        latent_std_confidence=exactly,
        num_images=0,
    )


def load_model(model: nn.Module, path: str, node: DictConfig | None = None) -> None:
    """Loads a denoiser to start from: a run of ours, a diffusers folder, its `unet` or `transformer`, or a file.

    Args:
        node: what the model was built from, to be held against the config of where it comes from.
    """
    place, key = Path(path).expanduser(), "model.weights"
    if (place / "diffusion" / "checkpoints").is_dir():
        checkpoint, _ = newest_valid(place / "diffusion" / "checkpoints")
        if checkpoint is None:
            raise ConfigError(f"{key}: {place} holds no valid checkpoint of stage 2")
        theirs = OmegaConf.to_container(OmegaConf.load(place / "config.yaml").model)
        require_config(model, node, theirs, place / "config.yaml", "model")
        state = read_checkpoint(checkpoint)
        state = {name.removeprefix("model."): t for name, t in state.items() if name.startswith("model.")}
        load_strictly(model, state, checkpoint, key)
    else:
        file = find(path, key, ("unet", "transformer"))
        require_config(model, node, _config_beside(file), file, "model")
        load_strictly(model, read_state(file, model.state_dict(), "unet", key), file, key)


def read_checkpoint(checkpoint: Path, averaged: bool | str | Path = True) -> dict[str, Tensor]:
    """A stage's weights, with the averages of those that have one in their place: the checkpoint's own, or a file's.

    Raises:
        ConfigError: where that file holds none of them.
    """
    state = load_file(checkpoint / MODEL)
    if averaged is True:
        averaged = checkpoint / EMA if (checkpoint / EMA).is_file() else False
    if not averaged:
        return state
    try:
        averages = load_file(averaged)
    except (SafetensorError, OSError) as error:
        raise ConfigError(f"{averaged} is no safetensors file: {error}") from error
    shared = state.keys() & averages.keys()
    if not shared:
        raise ConfigError(f"{averaged} holds no averages of the weights in {checkpoint}")
    return state | {name: averages[name] for name in shared}


def require_config(
    part: nn.Module, node: DictConfig | None, theirs: Mapping[str, Any] | None, source: Path, key: str
) -> None:
    """Refuses weights of a network that is configured otherwise: the number of heads shows in no shape.

    Raises:
        ConfigError: naming the first key that differs.
    """
    if node is None or theirs is None:
        return
    if "_class_name" in theirs:
        try:
            with torch.device("meta"):  # refuses keys and values that are not built here; our stage 1 knows no scale
                type(part).from_diffusers({k: v for k, v in theirs.items() if (k, v) != ("scaling_factor", None)})
        except ConfigError as error:
            raise ConfigError(f"{key}.weights: {source}: {error}") from error
    given = OmegaConf.to_container(node, resolve=True)
    for name, parameter in inspect.signature(type(part)).parameters.items():
        ours, other = given.get(name, parameter.default), theirs.get(name, parameter.default)
        is_said = name in theirs or not theirs.get("_is_partial")
        if is_said and name not in _FREE and not _same(ours, other):
            raise ConfigError(
                f"{key}.weights: {source} is of another network: {key}.{name} is {other} there, here {ours}"
            )


def _same(one: Any, other: Any) -> bool:  # noqa: ANN401 values of a config
    """As values of a config: a list equals its number where all of its items do."""
    one, other = (list(v) if isinstance(v, list | tuple) else v for v in (one, other))
    if isinstance(one, list) and isinstance(other, list):
        return len(one) == len(other) and all(map(_same, one, other))
    if isinstance(one, list) or isinstance(other, list):
        items, value = (one, other) if isinstance(one, list) else (other, one)
        return value is not None and all(_same(item, value) for item in items) and bool(items)
    return one == other


def _config_beside(file: Path) -> dict[str, Any] | None:
    """A diffusers config.json in the file's folder."""
    config = file.parent / "config.json"
    try:
        values = read_config(config) if config.is_file() else {}
    except ValueError as error:
        raise ConfigError(f"{config} cannot be read: {error}") from error
    return values if "_class_name" in values else None


def _config_within(file: Path) -> dict[str, Any]:
    """The scale that a single file was trained with: what our export noted, or what its family has; null for an
    autoencoder alone.
    """
    with safe_open(file, "pt") as opened:
        noted, names = (opened.metadata() or {}).get("sdtrain.vae"), opened.keys()
        if noted:
            return json.loads(noted)
        within = [name.removeprefix(PREFIXES["unet"]) for name in names if name.startswith(PREFIXES["unet"])]
        if any(name.startswith("joint_blocks.") for name in within):
            return {"scaling_factor": 1.5305, "shift_factor": 0.0609}  # Stable Diffusion 3
        if not any(name.startswith("input_blocks.") for name in within):
            return {"scaling_factor": None}
        if "label_emb.weight" in within:
            return {"scaling_factor": 0.08333}  # the upscaler, which is told a noise level
        is_xl = "label_emb.0.0.weight" in within and not any(name.startswith("cond_stage_model.") for name in names)
        return {"scaling_factor": 0.13025 if is_xl else 0.18215}
