"""From captions to pictures with a finished denoiser: what previews, metrics, tools and notebooks all call."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import nn

from sdtrain.contracts import Batch
from sdtrain.diffusion.guidance import classifier_free
from sdtrain.ops.random import Draw
from sdtrain.stage.autoencoder import to_uint8


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
        negative: Batch | None = None,
        size: int = 128,
    ) -> np.ndarray:
        """A picture for each sample of the batch -> uint8 (N, H, W, 3).

        Picture i depends on (seed, i) and its condition, not on how many are drawn together.

        Args:
            guidance_scale: the sampler's own by default.
            negative: what to move away from instead of the null condition.
            size: pictures drawn at once.
        """
        num = len(batch["caption"])
        device = next(self.model.parameters()).device
        pictures = []
        for start in range(0, num, size):
            part: Batch = {"caption": batch["caption"][start : start + size]}
            count = len(part["caption"])
            ids = torch.arange(start, start + count, device=device)
            draw = Draw(seed, ids, torch.zeros_like(ids))
            noise = draw.normal("generation", (self.first_stage.latent_channels, *self.latent_size))
            cond = self.conditioner(part)
            if negative is None:
                null = self.conditioner.unconditional(part)
            else:
                null = self.conditioner({"caption": negative["caption"][start : start + size]})
            scale = self.sampler.guidance_scale if guidance_scale is None else guidance_scale
            denoise = classifier_free(self.objective.x0_of(self.model), cond, null, scale)
            latent = self.sampler(denoise, noise, self.objective.path, draw)
            pictures.append(to_uint8(self.first_stage.decode(self.first_stage.unwhiten(latent))))
        return np.concatenate(pictures)
