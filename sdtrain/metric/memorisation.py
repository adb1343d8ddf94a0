"""Does the model copy? How far samples are from the nearest training picture, beside held-out pictures."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import avg_pool2d

COARSE = 16  # pixels a side of the pictures compared with all of the training pictures
NUM_CANDIDATES = 32  # training pictures that are then compared pixel by pixel


def memorisation(samples: np.ndarray, held_out: np.ndarray, training: np.ndarray) -> dict[str, float]:
    """Nearest-training-picture distances, RMS over pixels on [0, 255], of uint8 pictures (N, H, W, 3).

    "sample" and "held_out" are medians and "ratio" the first over the second: near 1 for a model that learned, near 0
    for one that copies. "closer" is the share of samples nearer to a training picture than 95 % of the held-out ones
    are: near 0.05 for a model that learned. The samples' captions should be those of the held-out pictures.
    """
    coarse = torch.cat([_coarse(training[i : i + 1024]) for i in range(0, len(training), 1024)])
    sample, reference = (_nearest(pictures, training, coarse) for pictures in (samples, held_out))
    medians = float(np.median(sample)), float(np.median(reference))
    return {
        "sample": medians[0],
        "held_out": medians[1],
        "ratio": medians[0] / max(medians[1], 1e-6),
        "closer": float(np.mean(sample < np.quantile(reference, 0.05))),
    }


def _coarse(pictures: np.ndarray) -> Tensor:
    pixels = torch.from_numpy(pictures).permute(0, 3, 1, 2).float()  # (N, 3, H, W)
    return avg_pool2d(pixels, max(pixels.shape[-1] // COARSE, 1)).flatten(1)  # (N, 768)


def _nearest(pictures: np.ndarray, training: np.ndarray, coarse: Tensor) -> np.ndarray:
    """RMS distance of each picture to its nearest training picture among the nearest in block means.

    The distance of block means never exceeds the distance of the pictures, so a copy is always among the candidates.
    """
    nearest = []
    squares = coarse.square().sum(1)
    for start in range(0, len(pictures), 128):
        chunk = pictures[start : start + 128]
        distance = squares - 2 * _coarse(chunk) @ coarse.T  # (128, T), less the chunk's own squares
        candidates = distance.topk(min(NUM_CANDIDATES, len(training)), largest=False).indices.numpy()
        for picture, near in zip(chunk, candidates):
            difference = training[near].astype(np.float32) - picture
            nearest.append(np.sqrt(np.square(difference).mean((1, 2, 3)).min()))
    return np.array(nearest)
