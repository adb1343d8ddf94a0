"""How samples are shown this time: crop, flip and the choice among captions, drawn by (seed, epoch, sample id)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from sdtrain.contracts import Batch
from sdtrain.data.bad_sample import BadSample
from sdtrain.data.decode import Decoded, decode_image
from sdtrain.errors import ConfigError
from sdtrain.ops.random import Draw

CROPS = ("center", "random")
NO_MASK = -1.0


class View(NamedTuple):
    """One sample's."""

    size: tuple[int, int] | None  # the picture's height and width; None: no picture is wanted
    crop: tuple[float, float] = (0.5, 0.5)  # the crop's place
    flip: bool = False
    draw: float = 0.0  # from [0, 1), chooses among captions


def check_crop(crop: str) -> str:
    """One of CROPS. Raises ConfigError."""
    if crop not in CROPS:
        raise ConfigError(f"data.reader.crop={crop!r} is none of 'center', 'random'")
    return crop


def draw_views(draw: Draw, num: int, size: tuple[int, int] | None, crop: str, flip: bool) -> list[View]:
    """Those of a draw's samples, so many."""
    crops, flips = [(0.5, 0.5)] * num, [False] * num
    if size and crop == "random":
        crops = [tuple(place) for place in draw.uniform("crop", (2,)).tolist()]
    if size and flip:
        flips = (draw.uniform("flip") < 0.5).tolist()
    return [View(size, *one) for one in zip(crops, flips, draw.uniform("caption").tolist())]


class Pictures(NamedTuple):
    """A sample's picture, and those that go with it: they are cut and mirrored as it is."""

    image: Decoded
    companions: Mapping[str, np.ndarray]  # uint8 (H, W, 3), those that it has


def decode_pictures(
    image: bytes, companions: Mapping[str, bytes | None], view: View, ground: tuple[int, int, int]
) -> Pictures:
    """Raises BadSample where one cannot be had, is missing and nothing stands in for it, or is of another size."""
    if companions.get("source", b"") is None:
        raise BadSample("no_source")
    there = {name: data for name, data in companions.items() if data is not None}
    how = {"crop": view.crop, "flip": view.flip, "is_whole": bool(there)}
    picture, found = decode_image(image, *view.size, ground=ground, **how), {}
    for name, data in there.items():
        other = decode_image(data, *view.size, ground=(0, 0, 0) if name == "mask" else ground, **how)
        if other.original_size != picture.original_size:
            raise BadSample("other_size", f"the {name} is {other.original_size}, the picture {picture.original_size}")
        found[name] = other.pixels
    return Pictures(picture, found)


def pictured(samples: Sequence[Pictures]) -> Batch:
    """What a batch says of its pictures, which are all of one size. A mask that is not there is NO_MASK everywhere."""
    pictures = [sample.image for sample in samples]
    image = to_float(np.stack([picture.pixels for picture in pictures]))
    found = _accompanied(samples, tuple(image.shape[2:]))
    found |= {
        "image": image,
        "original_size": torch.tensor([picture.original_size for picture in pictures]),  # (B, 2)
        "crop_top_left": torch.tensor([picture.crop_top_left for picture in pictures]),  # (B, 2)
        "target_size": torch.tensor([image.shape[2:]] * len(pictures)),  # (B, 2)
    }
    return found


def to_float(pixels: np.ndarray) -> Tensor:
    """uint8 (B, H, W, 3) -> float32 (B, 3, H, W) in [-1, 1], channels last in memory, as the networks run."""
    return torch.from_numpy(pixels).permute(0, 3, 1, 2).float().div_(127.5).sub_(1.0)  # (B, 3, H, W)


def _accompanied(samples: Sequence[Pictures], size: tuple[int, int]) -> Batch:
    found: Batch = {}
    if any("source" in sample.companions for sample in samples):
        found["source"] = to_float(np.stack([sample.companions["source"] for sample in samples]))
    if any("mask" in sample.companions for sample in samples):
        masks = [sample.companions.get("mask") for sample in samples]
        rows = [np.full(size, NO_MASK) if mask is None else mask.mean(axis=-1) / 255 for mask in masks]
        found["mask"] = torch.from_numpy(np.stack(rows)).float()[:, None]  # (B, 1, H, W)
    return found
