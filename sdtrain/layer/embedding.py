"""Embeddings of scalars: the sinusoidal timestep embedding and the two-layer network behind it."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F


def sinusoidal(time: Tensor, dim: int, *, flip_sin_to_cos: bool = True, freq_shift: float = 0.0) -> Tensor:
    """Sinusoidal embedding (Vaswani et al. 2017, section 3.5) of (B,) times as the network counts them -> (B, dim)
    float32.
    """
    half = dim // 2
    exponent = -math.log(10000.0) * torch.arange(half, dtype=torch.float32, device=time.device) / (half - freq_shift)
    angle = time.float()[:, None] * exponent.exp()[None]  # (B, dim / 2)
    sin, cos = angle.sin(), angle.cos()
    embedding = torch.cat((cos, sin) if flip_sin_to_cos else (sin, cos), dim=1)
    return F.pad(embedding, (0, dim % 2))


class TimestepEmbedding(nn.Module):
    """linear, SiLU, linear: (B, in_channels) -> (B, time_embed_dim)."""

    def __init__(self, in_channels: int, time_embed_dim: int) -> None:
        super().__init__()
        self.linear_1 = nn.Linear(in_channels, time_embed_dim)
        self.linear_2 = nn.Linear(time_embed_dim, time_embed_dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear_2(F.silu(self.linear_1(x)))
