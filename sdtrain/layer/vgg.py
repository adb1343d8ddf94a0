"""VGG (Simonyan and Zisserman 2015): plain convolutions whose features the perceptual loss compares."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

VGG16 = ((64, 64), (128, 128), (256, 256, 256), (512, 512, 512), (512, 512, 512))


class VGG(nn.Module):
    """Blocks of 3x3 convolutions with max-pooling between them; parameter names as torchvision's (`features.N`).

    Args:
        widths: the convolutions' widths, block by block; VGG16 by default.
    """

    def __init__(self, widths: Sequence[Sequence[int]] = VGG16) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        self.taps: list[int] = []  # the last ReLU of each block
        previous = 3
        for i, block in enumerate(widths):
            if i > 0:
                layers.append(nn.MaxPool2d(2))
            for width in block:
                layers += [nn.Conv2d(previous, width, 3, padding=1), nn.ReLU()]
                previous = width
            self.taps.append(len(layers) - 1)
        self.features = nn.Sequential(*layers)
        self.num_features = [block[-1] for block in widths]
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, nonlinearity="relu")
                nn.init.zeros_(module.bias)
        self.to(memory_format=torch.channels_last)

    def forward(self, x: Tensor) -> list[Tensor]:
        """(B, 3, H, W), normalised -> the features of each block, (B, width, H / 2^i, W / 2^i)."""
        taps = []
        x = x.contiguous(memory_format=torch.channels_last)
        for i, layer in enumerate(self.features):
            x = layer(x)
            if i in self.taps:
                taps.append(x)
        return taps
