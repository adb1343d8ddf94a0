"""The stage contract: what stage 2, every latent cache and every export must know of the first stage, and refuse to
guess.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from sdtrain.errors import ConfigError


@dataclass(frozen=True)
class Manifest:
    """DIR/autoencoder/manifest.json. The statistics are of the posterior's samples over `num_images` training
    pictures.
    """

    weight_hash: str
    down_factor: int
    latent_channels: int
    image_size: int
    latent_mean: list[float]
    latent_std: list[float]
    latent_mean_confidence: list[float]  # 95 %: plus or minus this
    latent_std_confidence: list[float]
    num_images: int
    input_range: tuple[float, float] = (-1.0, 1.0)
    colour_order: str = "RGB"
    latent_space: dict[str, Any] | None = None  # what `metric/latent_space.py` found; nothing depends on it

    def save(self, path: Path) -> None:
        """Atomic: written beside, synced, renamed."""
        path.parent.mkdir(parents=True, exist_ok=True)
        part = path.with_suffix(".tmp")
        with part.open("w") as file:
            json.dump(asdict(self), file, indent=2)
            file.flush()
            os.fsync(file.fileno())
        part.replace(path)

    @classmethod
    def load(cls, path: Path) -> Manifest:
        """Reads it back.

        Raises:
            ConfigError: where it is not there, or is not one.
        """
        try:
            values = json.loads(path.read_text())
            return cls(**values | {"input_range": tuple(values["input_range"])})
        except FileNotFoundError:
            raise ConfigError(f"no stage manifest {path}; has stage 1 finished there?") from None
        except (ValueError, TypeError, KeyError) as error:
            raise ConfigError(f"{path} is no stage manifest: {error}") from error

    def require(self, other: Manifest) -> None:
        """Refuses a first stage that is not the one this manifest describes.

        Raises:
            ConfigError: naming the first field that differs.
        """
        for name in ("weight_hash", "down_factor", "latent_channels", "input_range", "colour_order", "image_size"):
            ours, theirs = getattr(self, name), getattr(other, name)
            if ours != theirs:
                raise ConfigError(f"another first stage: {name} is {theirs}, this run was made with {ours}")

    def apply(self, first_stage: nn.Module) -> None:
        """Gives the first stage its whitening, after checking that it is the one described.

        Raises:
            ConfigError: naming the field that differs.
        """
        found = {"weight_hash": weight_hash(first_stage), "down_factor": first_stage.down_factor}
        found["latent_channels"] = first_stage.latent_channels
        for name, value in found.items():
            if value != getattr(self, name):
                raise ConfigError(
                    f"the stage manifest is of another first stage: {name} {getattr(self, name)}, here {value}"
                )
        first_stage.shift = list(self.latent_mean)
        first_stage.scale = [1.0 / max(std, 1e-6) for std in self.latent_std]


def weight_hash(module: nn.Module) -> str:
    """sha256 over names, types, shapes and bytes of a module's state, in order of name."""
    digest = hashlib.sha256()
    for name, tensor in sorted(module.state_dict().items()):
        tensor = tensor.detach().cpu().contiguous(memory_format=torch.contiguous_format)
        digest.update(f"{name}|{tensor.dtype}|{list(tensor.shape)}|".encode())
        digest.update(tensor.reshape(-1).clone().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def measure(first_stage: nn.Module, moments: Iterable[Tensor], image_size: int) -> Manifest:
    """The manifest of a first stage from its posteriors.

    Args:
        moments: batches (B, 2, C, h, w) of posterior mean and std over training pictures.
    """
    count, num_images = 0, 0
    total = torch.zeros(first_stage.latent_channels, dtype=torch.float64)
    squares, variances = total.clone(), total.clone()
    per_image: list[Tensor] = []
    for batch in moments:
        mean, std = batch.double().unbind(dim=1)  # (B, C, h, w)
        num_images += mean.shape[0]
        count += mean.shape[0] * mean.shape[2] * mean.shape[3]
        total += mean.sum(dim=(0, 2, 3))
        squares += mean.square().sum(dim=(0, 2, 3))
        variances += std.square().sum(dim=(0, 2, 3))
        per_image.append(torch.stack((mean.mean(dim=(2, 3)), mean.square().mean(dim=(2, 3))), dim=1))
    centre = total / count
    spread = (squares / count - centre.square() + variances / count).clamp(min=0).sqrt()
    # Positions of one picture are not independent, so the error is that of means over pictures.
    error = torch.cat(per_image).std(dim=0, correction=0) / math.sqrt(num_images) * 1.96  # (2, C)
    centre, spread = first_stage.whitening(centre, spread)
    return Manifest(
        weight_hash=weight_hash(first_stage),
        down_factor=first_stage.down_factor,
        latent_channels=first_stage.latent_channels,
        image_size=image_size,
        latent_mean=centre.tolist(),
        latent_std=spread.tolist(),
        latent_mean_confidence=error[0].tolist(),
        latent_std_confidence=(error[1] / (2 * spread.clamp(min=1e-6))).tolist(),
        num_images=num_images,
    )
