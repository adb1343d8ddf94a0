"""Does the model copy? How far samples are from the nearest training picture, beside held-out pictures."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.functional import avg_pool2d

COARSE = 16  # pixels a side of the pictures compared with all of the training pictures
NUM_CANDIDATES = 32  # training pictures of a part that are then compared pixel by pixel
PART = 1024  # training pictures at once
NUM_TRAINING = 50_000  # training pictures that are looked at where nothing else is asked for
_ROUNDING = 1.0  # of the distance of block means, in values of 255: float32 loses a little of it


class Nearest:
    """The RMS distances over pixels, on [0, 255], of some pictures from the nearest training pictures.

    Training pictures come in parts, by one rank or by several: no more than a part is in memory. The distance of block
    means never exceeds the distance of the pictures, so a copy is always among the candidates of its part.

    Args:
        pictures: uint8 (N, H, W, 3), the same on every rank.
    """

    def __init__(self, pictures: np.ndarray) -> None:
        self.pictures, self._coarse = pictures, _coarse(pictures)
        self._scale = _block(pictures) / pictures[0].size ** 0.5  # from differences of block means to RMS over pixels
        self.distances = np.full(len(pictures), np.inf)

    def update(self, training: np.ndarray) -> None:
        """Looks among a part of the training pictures, uint8 (T, H, W, 3)."""
        blocks = _coarse(training)
        for start in range(0, len(self.pictures), 128):
            bounds = torch.cdist(self._coarse[start : start + 128], blocks) * self._scale  # (128, T)
            found = bounds.topk(min(NUM_CANDIDATES, len(training)), largest=False)
            for place, near, bound in zip(range(start, start + 128), found.indices.numpy(), found.values.numpy()):
                near = near[bound < self.distances[place] + _ROUNDING]
                difference = training[near].astype(np.float32) - self.pictures[place]
                own = np.sqrt(np.square(difference).mean((1, 2, 3)))
                self.distances[place] = min(self.distances[place], own.min(initial=np.inf))

    def reduce(self) -> np.ndarray:
        """(N,) over what all ranks have seen. Every rank must call it."""
        found: list[np.ndarray] = [self.distances]
        if dist.is_initialized() and dist.get_world_size() > 1:
            found = [self.distances] * dist.get_world_size()
            dist.all_gather_object(found, self.distances)
        return np.min(found, axis=0)


def memorisation(samples: np.ndarray, held_out: np.ndarray, training: Iterable[np.ndarray]) -> dict[str, float]:
    """Nearest-training-picture distances, RMS over pixels on [0, 255], of uint8 pictures (N, H, W, 3).

    "sample" and "held_out" are medians and "ratio" the first over the second: near 1 for a model that learned, near 0
    for one that copies. "closer" is the share of samples nearer to a training picture than 95 % of the held-out ones
    are: near 0.05 for a model that learned. The samples' captions should be those of the held-out pictures.

    Samples and held-out pictures are the same on every rank; `training` gives this rank's parts of PART pictures, so
    that the figures are the same on any number of ranks.
    """
    nearest = Nearest(np.concatenate([samples, held_out]))
    for part in training:
        nearest.update(part)
    sample, reference = np.split(nearest.reduce(), [len(samples)])
    medians = float(np.median(sample)), float(np.median(reference))
    return {
        "sample": medians[0],
        "held_out": medians[1],
        "ratio": medians[0] / max(medians[1], 1e-6),
        "closer": float(np.mean(sample < np.quantile(reference, 0.05))),
    }


def _coarse(pictures: np.ndarray) -> Tensor:
    pooled = []
    for start in range(0, len(pictures), 128):
        pixels = torch.from_numpy(pictures[start : start + 128]).permute(0, 3, 1, 2).float()  # (128, 3, H, W)
        pooled.append(avg_pool2d(pixels, _block(pictures)).flatten(1))  # (128, 768)
    return torch.cat(pooled)


def _block(pictures: np.ndarray) -> int:
    """Pixels a side of the blocks of which COARSE stand side by side."""
    return max(min(pictures.shape[1:3]) // COARSE, 1)
