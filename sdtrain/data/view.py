"""How samples are shown this time: crop, flip and the choice among captions, drawn by (seed, epoch, sample id)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from sdtrain.contracts import Batch
from sdtrain.data.decode import Decoded
from sdtrain.errors import ConfigError
from sdtrain.ops.random import Draw

CROPS = ("center", "random")


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


def pictured(pictures: Sequence[Decoded]) -> Batch:
    """What a batch says of its pictures, which are all of one size."""
    image = to_float(np.stack([picture.pixels for picture in pictures]))
    return {
        "image": image,
        "original_size": torch.tensor([picture.original_size for picture in pictures]),  # (B, 2)
        "crop_top_left": torch.tensor([picture.crop_top_left for picture in pictures]),  # (B, 2)
        "target_size": torch.tensor([image.shape[2:]] * len(pictures)),  # (B, 2)
    }


def to_float(pixels: np.ndarray) -> Tensor:
    """uint8 (B, H, W, 3) -> float32 (B, 3, H, W) in [-1, 1], channels last in memory, as the networks run."""
    return torch.from_numpy(pixels).permute(0, 3, 1, 2).float().div_(127.5).sub_(1.0)  # (B, 3, H, W)
