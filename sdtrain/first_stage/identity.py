"""No first stage: diffusion in pixel space, the comparison that shows what the latent space saves."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn

from sdtrain.contracts import Posterior


class Identity(nn.Module):
    """Pixels are the latents. It has nothing to train, so the run skips stage 1.

    Args:
        latent_channels: of a picture: 3.
    """

    down_factor = 1

    def __init__(self, latent_channels: Literal[3] = 3) -> None:
        super().__init__()
        self.latent_channels = latent_channels
        self.shift, self.scale = [0.0] * 3, [1.0] * 3

    def encode(self, image: Tensor) -> Posterior:
        """The picture itself, exactly."""
        return Posterior(image, torch.zeros_like(image))

    def decode(self, latent: Tensor) -> Tensor:
        """The latent itself."""
        return latent

    def whiten(self, latent: Tensor) -> Tensor:
        """Pixels in [-1, 1] stay as they are."""
        return latent

    def unwhiten(self, latent: Tensor) -> Tensor:
        """As they are."""
        return latent
