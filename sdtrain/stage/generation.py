"""From captions to pictures with a finished denoiser: what previews, metrics, tools and notebooks all call."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from sdtrain.contracts import Batch
from sdtrain.ops.random import Draw
from sdtrain.stage.autoencoder import to_uint8


def for_conditioner(batch: Batch, first_stage: Any, latent_size: tuple[int, int]) -> Batch:  # noqa: ANN401 a part
    """The batch with what a conditioner may ask of the stage: the sizes, and the frozen first stage's latents."""

    @torch.no_grad()
    def encode(image: Tensor) -> Tensor:
        return first_stage.whiten(first_stage.encode(image).mean)

    image_size = (latent_size[0] * first_stage.down_factor, latent_size[1] * first_stage.down_factor)
    return {**batch, "image_size": image_size, "latent_size": latent_size, "encode": encode}


@dataclass
class Generation:
    """The parts that draw a picture. They are used as they stand: raw or averaged weights is the caller's choice."""

    model: nn.Module
    conditioner: nn.Module
    objective: Any
    first_stage: Any
    sampler: Any
    latent_size: tuple[int, int]

    @torch.no_grad()
    def __call__(
        self,
        batch: Batch,
        seed: int,
        guidance_scale: float | None = None,
        size: int = 128,
    ) -> np.ndarray:
        """A picture for each sample of the batch -> uint8 (N, H, W, 3).

        Picture i depends on (seed, i) and its condition, not on how many are drawn together.

        Args:
            guidance_scale: the sampler's own by default.
            size: pictures drawn at once.
        """
        guidance = self.sampler.guidance
        if guidance_scale is not None:
            guidance = replace(guidance, scale=guidance_scale)
        num = len(batch["caption"])
        device = next(self.model.parameters()).device
        pictures = []
        for start in range(0, num, size):
            part = _part(batch, slice(start, start + size), device)
            ids = torch.arange(start, start + len(part["caption"]), device=device)
            draw = Draw(seed, ids, torch.zeros_like(ids))
            noise = draw.normal("generation", (self.first_stage.latent_channels, *self.latent_size))
            part = for_conditioner({"sample_id": ids, **part}, self.first_stage, self.latent_size)
            cond = self.conditioner(part)
            null = self.conditioner.unconditional(part)
            x0_of = self.objective.x0_of(self.model, variance=getattr(self.sampler, "learned_variance", False))
            denoise = guidance(x0_of, cond, null)
            latent = self.sampler(denoise, noise, self.objective.path, draw)
            pictures.append(to_uint8(self.first_stage.decode(self.first_stage.unwhiten(latent))))
        return np.concatenate(pictures)


def _part(batch: Batch, rows: slice, device: torch.device) -> Batch:
    """Some samples of a batch, on the device, with everything that is known of them."""
    return {
        name: values[rows].to(device) if isinstance(values, Tensor) else values[rows]
        for name, values in batch.items()
        if isinstance(values, list | Tensor)
    }
