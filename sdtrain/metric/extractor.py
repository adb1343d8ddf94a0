"""What turns pictures into features: one manner of reading local weight files and of resizing, stated by name."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from pathlib import Path
from pickle import UnpicklingError
from typing import Protocol

import torch
from torch import Tensor, nn
from torch.nn.functional import interpolate

from sdtrain.errors import ConfigError


class Extractor(Protocol):
    """A frozen network of features; `identity` says which one, down to its weights.

    One with classes has `logits`, too: features (B, F) -> (B, classes), for the inception score.
    """

    num_features: int
    resize: str
    identity: dict[str, str]

    def __call__(self, pictures: Tensor) -> Tensor:
        """Pictures (B, 3, H, W), uint8 -> features (B, F)."""

    def to(self, device: torch.device | str) -> Extractor: ...


def sha256_of(path: Path) -> str:
    """Of a file, read in parts."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def read_weights(path: str | Path, key: str, wanted: str) -> dict[str, Tensor]:
    """A torch file of tensors, nothing else in it being run.

    Raises:
        ConfigError: naming the file wanted and where it is to be had.
    """
    if not Path(path).is_file():
        raise ConfigError(f"{key}: no file {path}; it wants {wanted}")
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except (UnpicklingError, EOFError, RuntimeError) as error:
        raise ConfigError(f"{key}: {path} cannot be read as weights: {str(error).partition(chr(10))[0]}") from error


def load_exactly(network: nn.Module, state: Mapping[str, Tensor], path: str | Path, key: str) -> None:
    """Every parameter of the network from the file; batch norms' counters, which nothing reads, may be absent.

    Raises:
        ConfigError: naming what does not fit.
    """
    own = {name: tensor for name, tensor in network.state_dict().items() if name.endswith("num_batches_tracked")}
    try:
        network.load_state_dict({**own, **state})
    except RuntimeError as error:
        raise ConfigError(f"{key}: {path} does not fit: {str(error).splitlines()[1].strip()}") from error


def legacy_bilinear(x: Tensor, side: int) -> Tensor:
    """TensorFlow 1's: pixel i of the result reads at i * size / side, with no half-pixel shift and no antialiasing."""
    for dim in (2, 3):
        size = x.shape[dim]
        place = torch.arange(side, device=x.device, dtype=torch.float32) * (size / side)
        low = place.floor().long().clamp(max=size - 1)
        shape = [1, 1, 1, 1]
        shape[dim] = side
        weight = (place - low).view(shape)
        x = x.index_select(dim, low) * (1 - weight) + x.index_select(dim, (low + 1).clamp(max=size - 1)) * weight
    return x


def bilinear(x: Tensor, side: int) -> Tensor:
    """pytorch-fid's: half-pixel centres, no antialiasing."""
    return interpolate(x, (side, side), mode="bilinear", align_corners=False)


def bicubic_antialiased(x: Tensor, side: int) -> Tensor:
    """Pillow's bicubic on floats, as clean-fid wants it."""
    return interpolate(x, (side, side), mode="bicubic", align_corners=False, antialias=True)


RESIZES: Mapping[str, Callable[[Tensor, int], Tensor]] = {
    found.__name__: found for found in (legacy_bilinear, bilinear, bicubic_antialiased)
}


def find_resize(name: str, key: str) -> Callable[[Tensor, int], Tensor]:
    """One of RESIZES. Raises ConfigError for another name."""
    if name not in RESIZES:
        raise ConfigError(f"{key}: there is no resize {name!r}; there are {', '.join(RESIZES)}")
    return RESIZES[name]


def digest_of(network: nn.Module) -> str:
    """sha256 over a network's tensors, names and bytes."""
    digest = hashlib.sha256()
    for name, tensor in sorted(network.state_dict().items()):
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
