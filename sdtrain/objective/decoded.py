"""An optional second loss of stage 2: the predicted x0, decoded, against the decoded x0."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from sdtrain.contracts import FirstStage, PathPoint


class Decoded(nn.Module):
    """weight * mean over samples of alpha(t)^2 / (alpha(t)^2 + sigma(t)^2) times the distance of the two decoded
    pictures.

    The noisier x_t is, the less its x0 can be known, and the less the loss counts.

    Args:
        weight: beside the latent loss.
        perceptual: a distance of pictures; null for the mean absolute difference of pixels.
    """

    def __init__(self, weight: float, perceptual: nn.Module | None = None) -> None:
        super().__init__()
        self.weight, self.perceptual = weight, perceptual

    def forward(self, first_stage: FirstStage, predicted: Tensor, x0: Tensor, at: PathPoint) -> Tensor:
        """predicted and x0 (B, C, h, w) whitened, `at` of (B,) -> ()."""
        picture = first_stage.decode(first_stage.unwhiten(predicted)).float()
        with torch.no_grad():
            real = first_stage.decode(first_stage.unwhiten(x0)).float()
        distance = (
            (picture - real).abs().flatten(1).mean(dim=1) if self.perceptual is None else self.perceptual(picture, real)
        )
        clean = at.alpha.square() / (at.alpha.square() + at.sigma.square())
        return self.weight * (clean * distance).mean()
