"""The PatchGAN discriminator (Isola et al. 2017, section 3.2.2): is each patch real?"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from sdtrain.layer.norm import GroupNorm


class PatchDiscriminator(nn.Module):
    """Strided convolutions to a map of logits, one a patch. It normalises per sample (GroupNorm), so no picture sees
    its batch.

    Args:
        width: channels of the first layer; doubled at each further one, up to eight times.
        num_layers: strided layers; the patch is 16 pixels wide for 1, 34 for 2, 70 for 3.
    """

    def __init__(self, in_channels: int = 3, width: int = 64, num_layers: int = 3, norm_num_groups: int = 8) -> None:
        super().__init__()
        layers: list[nn.Module] = [nn.Conv2d(in_channels, width, 4, stride=2, padding=1), nn.LeakyReLU(0.2)]
        previous = width
        for i in range(1, num_layers + 1):
            channels = width * min(2**i, 8)
            layers += [
                nn.Conv2d(previous, channels, 4, stride=2 if i < num_layers else 1, padding=1, bias=False),
                GroupNorm(norm_num_groups, channels),
                nn.LeakyReLU(0.2),
            ]
            previous = channels
        layers.append(nn.Conv2d(previous, 1, 4, padding=1))
        self.layers = nn.Sequential(*layers)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.normal_(module.weight, 0.0, 0.02)
        self.to(memory_format=torch.channels_last)

    def forward(self, image: Tensor) -> Tensor:
        """(B, 3, H, W) in [-1, 1] -> logits (B, 1, H', W')."""
        return self.layers(image.contiguous(memory_format=torch.channels_last))
