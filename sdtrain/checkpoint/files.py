"""The files of a checkpoint: weights as safetensors, the rest of the training state as plain tensors and values."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

MODEL, EMA, TRAINING = "model.safetensors", "ema.safetensors", "training.pt"


def write(checkpoint: Mapping[str, Any], directory: Path) -> None:
    """Splits a checkpoint: `state_dict` and `ema` into safetensors, the rest into a file that loads without pickle."""
    _save_tensors(checkpoint["state_dict"], directory / MODEL)
    if "ema" in checkpoint:
        _save_tensors(checkpoint["ema"], directory / EMA)
    rest = {key: value for key, value in checkpoint.items() if key not in ("state_dict", "ema")}
    torch.save(rest, directory / TRAINING)
    # A type that only pickle could bring back must fail this save, not the resume. Memory-mapped: no tensor is read.
    torch.load(directory / TRAINING, weights_only=True, mmap=True, map_location="cpu")


def read(directory: Path, map_location: Any = "cpu") -> dict[str, Any]:
    """The checkpoint that `write` was given, bit for bit. Verify the directory first."""
    checkpoint = torch.load(directory / TRAINING, weights_only=True, map_location=map_location)
    checkpoint["state_dict"] = load_file(directory / MODEL)
    if (directory / EMA).is_file():
        checkpoint["ema"] = load_file(directory / EMA)
    return checkpoint


def count_bytes(state: Any) -> int:
    """About what `state` takes on the disk: its tensors, and a kilobyte for each one's name and place."""
    if isinstance(state, Tensor):
        return state.nbytes + 1024
    if isinstance(state, Mapping):
        return sum(count_bytes(value) for value in state.values())
    if isinstance(state, list | tuple):
        return sum(count_bytes(value) for value in state)
    return 0


def _save_tensors(tensors: Mapping[str, Tensor], path: Path) -> None:
    plain: dict[str, Tensor] = {}
    storages: set[int] = set()
    for name, tensor in tensors.items():
        plain[name] = tensor.detach().cpu().contiguous()
        # safetensors refuses two names for one memory; tied weights are written under each, so any reader finds them
        if plain[name].untyped_storage().data_ptr() in storages:
            plain[name] = plain[name].clone()
        storages.add(plain[name].untyped_storage().data_ptr())
    save_file(plain, path)
