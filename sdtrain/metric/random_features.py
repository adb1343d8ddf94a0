"""Features of a small random network: they tell pictures apart and need no file. No figure of theirs is comparable."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from sdtrain.metric.extractor import digest_of, find_resize


class RandomFeatures(nn.Module):
    """Two random convolutions, pooled. For tests, CI and the quickstart; the same network for the same seed.

    Args:
        num_features: F.
        side: pictures are resized to it, in pixels.
        seed: of the weights.
        resize: by name, see extractor.py.
    """

    def __init__(
        self, num_features: int = 64, side: int = 32, seed: int = 0, resize: str = "bicubic_antialiased"
    ) -> None:
        super().__init__()
        self.num_features, self.side, self.resize = num_features, side, resize
        self._resized = find_resize(resize, "random_features.resize")
        self.layers = nn.Sequential(
            nn.Conv2d(3, 32, 5, stride=2), nn.ReLU(), nn.Conv2d(32, num_features, 3, stride=2), nn.ReLU()
        )
        generator = torch.Generator().manual_seed(seed)
        for parameter in self.parameters():
            fan_in = parameter[0].numel() if parameter.dim() > 1 else 10
            with torch.no_grad():
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * (2 / fan_in) ** 0.5)
        self.requires_grad_(False)
        self.eval()
        self.identity = {"network": "random_features", "sha256": digest_of(self)}

    @torch.no_grad()
    def forward(self, pictures: Tensor) -> Tensor:
        """Pictures (B, 3, H, W), uint8 -> (B, F)."""
        return self.layers(self._resized(pictures.float(), self.side) / 127.5 - 1).mean(dim=(2, 3))
