"""Pictures that a stage draws beside held-out ones while it trains: FID and its like."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import lightning as L
import numpy as np
import torch

from sdtrain.contracts import Batch
from sdtrain.errors import ConfigError
from sdtrain.metric.distribution import SEED_STRIDE, Distribution, shares
from sdtrain.stage.autoencoder import to_uint8


def real_pictures(data: L.LightningDataModule, split: str, places: Sequence[int]) -> np.ndarray:
    """uint8 (N, H, W, 3) of a split.

    Raises:
        ConfigError: where latents are all that is left of them.
    """
    batch = data.load(split, places, as_images=True)
    if "image" not in batch:
        raise ConfigError("data: the shards that the latents were made of are gone, and so are the pictures to compare")
    return to_uint8(batch["image"])


@torch.no_grad()
def compare(
    distribution: Distribution,
    data: L.LightningDataModule,
    generate: Callable[[Batch, int], np.ndarray],
    device: torch.device | str,
    rank: int,
    world_size: int,
) -> dict[str, float]:
    """The figures of pictures that `generate` (batch, seed) draws with the held-out captions. All ranks together.

    Ranks draw as often and as many as each other, since sharded weights are gathered by all together; what is too much
    does not count.
    """
    num_held_out = data.splits["val"]
    if distribution.real is None:
        seen = distribution.see(device)
        for _, places in shares(num_held_out, distribution.batch, rank, world_size):
            if places:
                seen.add(real_pictures(data, "val", places), places)
        distribution.real = seen.reduce()
    seen = distribution.see(device)
    for number, places in shares(distribution.num_images, distribution.batch, rank, world_size):
        filled = [*places, *[0] * (distribution.batch - len(places))]
        batch = data.load("val", [place % num_held_out for place in filled], as_images=True)
        pictures = generate(batch, distribution.seed + number * SEED_STRIDE)[: len(places)]
        if places:
            seen.add(pictures, places)
    return distribution.figures(seen.reduce())
