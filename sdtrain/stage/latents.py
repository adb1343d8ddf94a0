"""What stage 2 needs of the latents of a frozen first stage: their statistics, a copy of all of them in memory, and
proof that those on disk are of this first stage.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import lightning as L
import torch
from torch import Tensor, nn

from sdtrain.errors import ConfigError
from sdtrain.first_stage.manifest import Manifest, measure, weight_hash
from sdtrain.stage.base import images_at_once

_BATCH = 128
_MOST_BYTES = 16 << 30
_NUM_CHECKED = 16
_TOLERANCE = 0.02  # of a latent's size; TF32 and other kernels stay under a tenth of it


def _device(first_stage: nn.Module) -> torch.device:
    return next(first_stage.parameters(), torch.empty(0)).device


@torch.no_grad()
def _moments(first_stage: nn.Module, data: L.LightningDataModule, split: str, num: int) -> Iterator[Tensor]:
    """Posterior mean and std (B, 2, C, h, w) of the first pictures of a split, in order and in fixed batches."""
    device = _device(first_stage)
    size = images_at_once(_BATCH, data.image_size)
    for start in range(0, num, size):
        batch = data.load(split, range(start, min(start + size, num)), as_images=True)
        if "image" in batch:
            yield torch.stack(first_stage.encode(batch["image"].to(device)), dim=1).cpu()
        else:  # latents are all that is left of them
            yield batch["latent"].float()


def measure_latents(first_stage: nn.Module, data: L.LightningDataModule, num_images: int = 1024) -> Manifest:
    """The stage manifest, from the first training pictures."""
    num = min(num_images, data.splits["train"])
    return measure(first_stage, _moments(first_stage, data, "train", num), data.image_size)


def cache_latents(first_stage: nn.Module, data: L.LightningDataModule, precision: str) -> None:
    """Encodes every picture once, so that training reads latents; a resumed run encodes the same batches to the same
    bits.

    Raises:
        ConfigError: where they would take more than 16 GiB.
    """
    side = data.image_size // first_stage.down_factor
    for split in ("train", "val"):
        num_bytes = data.splits[split] * 4 * first_stage.latent_channels * side * side
        if num_bytes > _MOST_BYTES:
            raise ConfigError(
                f"diffusion.cache_latents: the latents of {data.splits[split]} pictures take "
                f"{num_bytes >> 30} GiB of memory; set diffusion.cache_latents=false"
            )
        moments = _moments(first_stage, data, split, data.splits[split])
        with torch.autocast(_device(first_stage).type, torch.bfloat16, enabled=precision.startswith("bf16")):
            parts = [part.half() for part in moments]
        data.attach_latents(split, torch.cat(parts))


def identity(first_stage: nn.Module) -> dict[str, Any]:
    """What stored latents are refused by: all that an encoder's output depends on."""
    return {
        "weight_hash": weight_hash(first_stage),
        "down_factor": first_stage.down_factor,
        "latent_channels": first_stage.latent_channels,
        "input_range": [-1.0, 1.0],
        "colour_order": "RGB",
    }


def has_latents(data: L.LightningDataModule) -> bool:
    """Whether the data are latents on disk, with or without the pictures they came from."""
    return hasattr(data, "require")


@torch.no_grad()
def check_latents(first_stage: nn.Module, data: L.LightningDataModule, seed: int) -> int:
    """Encodes 16 pictures again, drawn by the seed, and returns how many there were: none where they are gone.

    Raises:
        ConfigError: where the latents on disk are another first stage's, or not what it makes of the pictures now.
    """
    data.require(identity(first_stage))
    num = 0
    for stored, batch in data.pairs(_NUM_CHECKED, seed):
        num += 1
        again = torch.stack(first_stage.encode(batch["image"].to(_device(first_stage))), dim=1).cpu()
        error = (again - stored["latent"].float()).square().mean().sqrt() / again.square().mean().sqrt()
        if not error <= _TOLERANCE:
            raise ConfigError(
                f"data.folder: {stored['key'][0]} encodes to another latent now, {error:.1%} off; the shards or the "
                "files have changed: make the latents again with tools/precompute_latents.py"
            )
    return num
