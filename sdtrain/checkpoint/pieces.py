"""An optimizer's state by parameter name, whole or in pieces: saved by any number of ranks, read by any other number.

A tensor's key is "parameter/state/start", start its first element's place in the flattened whole.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from sdtrain.errors import RunError

PATTERN = "optimizer_*.safetensors"


def file_name(rank: int) -> str:
    """Of what one rank saves."""
    return f"optimizer_{rank:05d}.safetensors"


def by_name(state_dict: Mapping[str, Any], names: Sequence[str]) -> dict[str, Any]:
    """An optimizer's `state_dict()`, which counts parameters, by their names instead: `tensors`, `values`, `groups`."""
    tensors: dict[str, Tensor] = {}
    values: dict[str, Any] = {}
    for number, state in state_dict["state"].items():
        for key, value in state.items():
            target = tensors if isinstance(value, Tensor) else values
            target[f"{names[number]}/{key}/0"] = value
    groups = [{k: v for k, v in group.items() if k != "params"} for group in state_dict["param_groups"]]
    return {"tensors": tensors, "values": values, "groups": groups}


def by_number(
    saved: Mapping[str, Any], current: Mapping[str, Any], named: Sequence[tuple[str, Tensor]]
) -> dict[str, Any]:
    """What `by_name` or the ranks of ZeRO saved, as the `state_dict()` of an optimizer whose own is `current`.

    Args:
        named: its parameters, in its order. Their moments take their strides, which fused kernels rely on.
    """
    pieces: Pieces = saved["tensors"]
    state: dict[int, dict[str, Any]] = {}
    for number, (name, p) in enumerate(named):
        found = {key: pieces.read(name, key) for key in pieces.keys(name)}
        for key, value in found.items():
            if key != "step" and value.numel() == p.numel():
                found[key] = torch.empty_like(p, dtype=value.dtype, device="cpu").copy_(value.view(p.shape))
        found |= {key: saved["values"][f"{name}/{key}/0"] for key in _keys(saved["values"], name)}
        if found:
            state[number] = found
    groups = [{**old, "params": new["params"]} for old, new in zip(saved["groups"], current["param_groups"])]
    return {"state": state, "param_groups": groups + list(current["param_groups"])[len(groups) :]}


class Pieces:
    """The tensors of a checkpoint's optimizer files, read as they are asked for. Verify the directory first."""

    def __init__(self, directory: Path) -> None:
        self._files = [safe_open(path, "pt") for path in sorted(directory.glob(PATTERN))]
        self._places: dict[tuple[str, str], list[tuple[int, Any, str]]] = {}
        for file in self._files:
            for full in file.keys():  # noqa: SIM118 no mapping
                name, key, start = full.rsplit("/", 2)
                self._places.setdefault((name, key), []).append((int(start), file, full))
        self._known: dict[str, list[str]] = {}
        for name, key in self._places:
            self._known.setdefault(name, []).append(key)

    def keys(self, name: str) -> list[str]:
        """What there is of a parameter."""
        return self._known.get(name, [])

    def read(self, name: str, key: str, start: int = 0, stop: int | None = None) -> Tensor:
        """Elements `start` to `stop` of the flattened whole; without `stop` the whole, in its own shape if it was saved
        whole.

        Raises:
            RunError: where elements are missing.
        """
        places = sorted(self._places[name, key], key=lambda place: place[0])
        if stop is None and len(places) == 1:
            return places[0][1].get_tensor(places[0][2])
        parts, reached = [], start
        for begin, file, full in places:
            shape = file.get_slice(full).get_shape()
            end = begin + torch.Size(shape).numel()
            first, last = max(reached, begin), end if stop is None else min(stop, end)
            if first == reached and first < last:
                cut = slice(first - begin, last - begin)
                whole = file.get_slice(full) if len(shape) == 1 else file.get_tensor(full).flatten()
                parts.append(whole[cut])
                reached = last
        if not parts or (stop is not None and reached != stop):
            raise RunError(f"the checkpoint has no elements {reached} to {stop} of {key} of {name}", 3)
        return torch.cat(parts)


def _keys(values: Iterable[str], name: str) -> list[str]:
    return [key.rsplit("/", 2)[1] for key in values if key.rsplit("/", 2)[0] == name]
