"""The files of a checkpoint: tensors as safetensors, the rest of the training state as plain values."""

from __future__ import annotations

import re
from bisect import bisect
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from sdtrain.checkpoint.pieces import Pieces, file_name

MODEL, EMA, TRAINING = "model.safetensors", "ema.safetensors", "training.pt"
_AVERAGE = re.compile(r"ema(_\d\.\d{3})?")


def write(checkpoint: Mapping[str, Any], directory: Path, rank: int = 0) -> list[Path]:
    """Splits a checkpoint: weights and averages into safetensors, what the optimizer holds into another, the rest into
    a file that loads without pickle. Of ranks other than the first only what the optimizer holds. Returns the files.
    """
    written = [directory / file_name(rank)]
    optimizers = [dict(state) for state in checkpoint.get("optimizer_states", [])]
    _save_tensors({name: t for state in optimizers for name, t in state.pop("tensors").items()}, written[0])
    if rank:
        return written
    weights = {"model": checkpoint["state_dict"]} | {key: v for key, v in checkpoint.items() if is_average(key)}
    written += write_averages(weights, directory)
    rest = {key: value for key, value in checkpoint.items() if key != "state_dict" and key not in weights}
    torch.save(rest | {"optimizer_states": optimizers}, directory / TRAINING)
    # A type that only pickle could bring back must fail this save, not the resume. Memory-mapped: no tensor is read.
    torch.load(directory / TRAINING, weights_only=True, mmap=True, map_location="cpu")
    return [*written, directory / TRAINING]


def read(directory: Path, map_location: Any = "cpu") -> dict[str, Any]:
    """The checkpoint that `write` was given, bit for bit. Verify the directory first."""
    checkpoint = torch.load(directory / TRAINING, weights_only=True, map_location=map_location)
    checkpoint["state_dict"] = load_file(directory / MODEL)
    for state in checkpoint["optimizer_states"]:
        state["tensors"] = Pieces(directory)
    for path in directory.glob("ema*.safetensors"):
        checkpoint[path.stem] = load_file(path)
    return checkpoint


def is_average(key: str) -> bool:
    """Whether a checkpoint's entry holds averaged weights: "ema", or "ema_0.100" of another length."""
    return _AVERAGE.fullmatch(key) is not None


def write_averages(averages: Mapping[str, Mapping[str, Tensor]], directory: Path) -> list[Path]:
    """A safetensors file of each entry; returns the files."""
    for key, tensors in averages.items():
        _save_tensors(tensors, directory / f"{key}.safetensors")
    return [directory / f"{key}.safetensors" for key in averages]


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
    spans: list[tuple[int, int]] = []  # of memory that has a name, in order
    for name, tensor in tensors.items():
        plain[name] = tensor.detach().cpu().contiguous()
        first, last = plain[name].data_ptr(), plain[name].data_ptr() + tensor.nbytes
        place = bisect(spans, (first, last))
        # safetensors refuses two names for one memory; tied weights are written under each, so any reader finds them
        if any(start < last and first < stop for start, stop in spans[max(place - 1, 0) : place + 1]):
            plain[name] = plain[name].clone()
        elif first < last:
            spans.insert(place, (first, last))
    save_file(plain, path)
