"""What stage 2 needs of the latents of a frozen first stage: their statistics, and a copy of all of them in memory."""

from __future__ import annotations

from collections.abc import Iterator

import lightning as L
import torch
from torch import Tensor, nn

from sdtrain.errors import ConfigError
from sdtrain.first_stage.manifest import Manifest, measure
from sdtrain.stage.base import images_at_once

_BATCH = 128
_MOST_BYTES = 16 << 30


def _device(first_stage: nn.Module) -> torch.device:
    return next(first_stage.parameters(), torch.empty(0)).device


@torch.no_grad()
def _moments(first_stage: nn.Module, data: L.LightningDataModule, split: str, num: int) -> Iterator[Tensor]:
    """Posterior mean and std (B, 2, C, h, w) of the first pictures of a split, in order and in fixed batches."""
    device = _device(first_stage)
    size = images_at_once(_BATCH, data.image_size)
    for start in range(0, num, size):
        image = data.load(split, range(start, min(start + size, num)), as_images=True)["image"].to(device)
        yield torch.stack(first_stage.encode(image), dim=1).cpu()


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
