"""Residual blocks and resampling, with the parameter names of diffusers."""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional as F

from sdtrain.layer.conv import Conv1x1, Conv3x3
from sdtrain.layer.norm import GroupNorm


class ResnetBlock(nn.Module):
    """GroupNorm, SiLU, convolution, twice, around a shortcut; the timestep is added between the two (Ho et al. 2020,
    appendix B).

    Args:
        time_embed_dim: width of the timestep embedding, or None where there is none (an autoencoder).
        zero_init: start as the identity: the second convolution is zero (Dhariwal and Nichol 2021, appendix A).
    """

    is_region = True  # for ops/compile.py

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        *,
        time_embed_dim: int | None = None,
        groups: int = 32,
        eps: float = 1e-6,
        dropout: float = 0.0,
        zero_init: bool = False,
    ) -> None:
        super().__init__()
        self.norm1 = GroupNorm(groups, in_channels, eps, silu=True)
        self.conv1 = Conv3x3(in_channels, out_channels)
        if time_embed_dim is not None:
            self.time_emb_proj = nn.Linear(time_embed_dim, out_channels)
        self.norm2 = GroupNorm(groups, out_channels, eps, silu=True)
        self.dropout = nn.Dropout(dropout)
        self.conv2 = Conv3x3(out_channels, out_channels)
        if zero_init:
            nn.init.zeros_(self.conv2.weight)
            nn.init.zeros_(self.conv2.bias)
        if in_channels != out_channels:
            self.conv_shortcut = Conv1x1(in_channels, out_channels)

    def forward(self, x: Tensor, temb: Tensor | None = None) -> Tensor:
        """x (B, C, H, W), temb (B, T) after its SiLU -> (B, C', H, W)."""
        h = self.conv1(self.norm1(x))
        if temb is not None:
            h = h + self.time_emb_proj(temb)[:, :, None, None]
        h = self.conv2(self.dropout(self.norm2(h)))
        if hasattr(self, "conv_shortcut"):
            x = self.conv_shortcut.of_map(x)
        return x + h


class Downsample(nn.Module):
    """Halves height and width by a strided convolution; `asymmetric` pads at the right and bottom only, as VAEs do."""

    def __init__(self, channels: int, asymmetric: bool = False) -> None:
        super().__init__()
        self.asymmetric = asymmetric
        self.conv = nn.Conv2d(channels, channels, 3, stride=2, padding=0 if asymmetric else 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.pad(x, (0, 1, 0, 1)) if self.asymmetric else x)


class Upsample(nn.Module):
    """Doubles height and width: nearest neighbour, then a convolution."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = Conv3x3(channels, channels)

    def forward(self, x: Tensor, size: tuple[int, int] | None = None) -> Tensor:
        x = F.interpolate(x, size=size) if size else F.interpolate(x, scale_factor=2.0)
        return self.conv(x)
