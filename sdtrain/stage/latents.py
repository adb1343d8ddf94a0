"""What stage 2 needs of the latents of a frozen first stage: their statistics, a copy of all of them in memory, and
proof that those on disk are of this first stage.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import lightning as L
import torch
from torch import Tensor, nn

from sdtrain.errors import ConfigError
from sdtrain.first_stage.manifest import Manifest, measure, weight_hash
from sdtrain.metric.latent_space import LatentSpace
from sdtrain.stage.base import images_at_once

_BATCH = 128
_MOST_BYTES = 16 << 30
_NUM_CHECKED = 16
_TOLERANCE = 0.02  # of a latent's size; TF32 and other kernels stay under a tenth of it


def _device(first_stage: nn.Module) -> torch.device:
    return next(first_stage.parameters(), torch.empty(0)).device


@torch.no_grad()
def _encoded(
    first_stage: nn.Module, data: L.LightningDataModule, split: str, num: int
) -> Iterator[tuple[Tensor | None, Tensor]]:
    """The first pictures of a split (B, 3, H, W), in order and in fixed batches, and their posteriors' mean and std
    (B, 2, C, h, w).
    """
    device = _device(first_stage)
    size = images_at_once(_BATCH, data.image_size)
    for start in range(0, num, size):
        batch = data.load(split, range(start, min(start + size, num)), as_images=True)
        if "image" in batch:
            yield batch["image"], torch.stack(first_stage.encode(batch["image"].to(device)), dim=1).cpu()
        else:  # latents are all that is left of them
            yield None, batch["latent"].float()


def measure_latents(first_stage: nn.Module, data: L.LightningDataModule, num_images: int = 1024) -> Manifest:
    """The stage manifest, from the first training pictures."""
    space, has_pictures = LatentSpace(), []

    def moments() -> Iterator[Tensor]:
        for image, found in _encoded(first_stage, data, "train", min(num_images, data.splits["train"])):
            has_pictures.append(image is not None)
            if image is not None:
                space.add(image, found)
            yield found

    manifest = measure(first_stage, moments(), data.image_size)
    return replace(manifest, latent_space=space.figures()) if all(has_pictures) else manifest


def latent_figures(manifest: Manifest) -> dict[str, Any]:
    """What stage 1's summary says of its latents."""
    found = manifest.latent_space or {"neighbour_correlation": None, "dead_channels": []}
    return {
        "weight_hash": manifest.weight_hash,
        "neighbour_correlation": found["neighbour_correlation"],
        "num_dead_channels": len(found["dead_channels"]),
    }


def require_room(first_stage: nn.Module, data: L.LightningDataModule) -> None:
    """For latents in memory. Raises ConfigError where those of a split would take more than 16 GiB."""
    side = data.image_size // first_stage.down_factor
    for num in data.splits.values():
        num_bytes = num * 4 * first_stage.latent_channels * side**2
        if num_bytes > _MOST_BYTES:
            raise ConfigError(
                f"diffusion.cache_latents: the latents of {num} pictures take {num_bytes >> 30} GiB of memory; set "
                "diffusion.cache_latents=false"
            )


def cache_latents(first_stage: nn.Module, data: L.LightningDataModule, precision: str) -> None:
    """Encodes every picture once, so that training reads latents; a resumed run encodes the same batches to the same
    bits.

    Raises:
        ConfigError: where they would take more than 16 GiB.
    """
    require_room(first_stage, data)
    for split in ("train", "val"):
        encoded = _encoded(first_stage, data, split, data.splits[split])
        with torch.autocast(_device(first_stage).type, torch.bfloat16, enabled=precision.startswith("bf16")):
            parts = [moments.half() for _, moments in encoded]
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


def text_identity(text_encoder: nn.Module) -> dict[str, Any]:
    """What stored text embeddings are refused by."""
    return {"weight_hash": weight_hash(text_encoder.encoder), **text_encoder.settings()}


def use_stored_text(conditioner: nn.Module, data: L.LightningDataModule) -> None:
    """Where the latents have text embeddings beside them, the text encoders that made them read them; others encode.

    Raises:
        ConfigError: where the conditioner has no such encoder, or one with other settings, naming the field.
    """
    if not data.text:
        return
    frozen = [part for part in conditioner.modules() if hasattr(part, "reads_stored") and not part.trained]
    if not frozen:
        raise ConfigError(
            "data.text: stored text embeddings stand in for a frozen text encoder, and the conditioner has none; set "
            "data.text=false"
        )
    identities = [text_identity(part) for part in frozen]
    names = [next((n for n, told in data.text.items() if told["encoder"] == found), "") for found in identities]
    hashes = {told["encoder"]["weight_hash"] for told in data.text.values()}
    for found, name in zip(identities, names):
        if not name and (found["weight_hash"] in hashes or not any(names)):
            data.require_text(found)
    for part, name in zip(frozen, names):
        part.reads_stored = name
    data.take_text({name for name in names if name})


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
