"""Attention and the transformer block of the U-Net, with the parameter names of diffusers."""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional as F

from sdtrain.layer.norm import GroupNorm


def attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
    """Scaled dot-product attention over (B, heads, L, D); mask broadcasts, True = attend.

    On a CPU, torch's flash backward took 4 times as long as three plain products at the lengths of small latents
    (measured: `tools/bench/attention.py`), so short sequences go the plain way there.
    """
    if q.device.type != "cpu" or q.shape[-2] * k.shape[-2] > 256 * 256:
        return F.scaled_dot_product_attention(q, k, v, mask)
    scores = (q * q.shape[-1] ** -0.5) @ k.transpose(-1, -2)  # (B, heads, L, M)
    if mask is not None:
        scores = scores.masked_fill(~mask, float("-inf"))
    return scores.softmax(dim=-1).to(v.dtype) @ v  # (B, heads, L, D)


class Attention(nn.Module):
    """Multi-head attention over (B, L, D), one scaled-dot-product call; `context` makes it cross-attention.

    Args:
        norm_groups: a GroupNorm over the channels before it and a residual around it: the autoencoder's form.
    """

    def __init__(
        self,
        query_dim: int,
        *,
        num_heads: int,
        head_dim: int,
        cross_attention_dim: int | None = None,
        bias: bool = False,
        norm_groups: int | None = None,
        eps: float = 1e-6,
    ) -> None:
        super().__init__()
        inner = num_heads * head_dim
        context_dim = cross_attention_dim or query_dim
        self.num_heads = num_heads
        if norm_groups is not None:
            self.group_norm = GroupNorm(norm_groups, query_dim, eps)
        self.to_q = nn.Linear(query_dim, inner, bias=bias)
        self.to_k = nn.Linear(context_dim, inner, bias=bias)
        self.to_v = nn.Linear(context_dim, inner, bias=bias)
        self.to_out = nn.ModuleList([nn.Linear(inner, query_dim), nn.Dropout(0.0)])

    def forward(self, x: Tensor, context: Tensor | None = None, mask: Tensor | None = None) -> Tensor:
        """x (B, L, D), context (B, M, E), mask (B, M) bool with True = attend -> (B, L, D)."""
        context = x if context is None else context
        q, k, v = self.to_q(x), self.to_k(context), self.to_v(context)
        q, k, v = (y.unflatten(-1, (self.num_heads, -1)).transpose(1, 2) for y in (q, k, v))  # (B, heads, L, D / heads)
        attended = attend(q, k, v, None if mask is None else mask[:, None, None, :])
        return self.to_out[0](attended.transpose(1, 2).flatten(2))  # (B, L, D)

    def spatial(self, x: Tensor) -> Tensor:
        """The autoencoder's form: x (B, C, H, W) -> x + attention(group_norm(x))."""
        tokens = self.group_norm(x).flatten(2).transpose(1, 2)  # (B, H W, C)
        return x + self(tokens).transpose(1, 2).unflatten(2, x.shape[2:])  # (B, C, H, W)


class GEGLU(nn.Module):
    """Gated linear unit with GELU (Shazeer 2020)."""

    def __init__(self, dim: int, inner: int) -> None:
        super().__init__()
        self.proj = nn.Linear(dim, inner * 2)

    def forward(self, x: Tensor) -> Tensor:
        x, gate = self.proj(x).chunk(2, dim=-1)
        return x * F.gelu(gate)


class FeedForward(nn.Module):
    """GEGLU and a linear layer, four times as wide inside."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.net = nn.ModuleList([GEGLU(dim, dim * 4), nn.Dropout(0.0), nn.Linear(dim * 4, dim)])

    def forward(self, x: Tensor) -> Tensor:
        return self.net[2](self.net[0](x))


class TransformerBlock(nn.Module):
    """Self-attention, cross-attention, feed-forward, each behind a LayerNorm and inside a residual."""

    def __init__(self, dim: int, num_heads: int, head_dim: int, cross_attention_dim: int | None) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(dim)
        self.attn1 = Attention(dim, num_heads=num_heads, head_dim=head_dim)
        self.norm2 = nn.LayerNorm(dim)
        self.attn2 = Attention(dim, num_heads=num_heads, head_dim=head_dim, cross_attention_dim=cross_attention_dim)
        self.norm3 = nn.LayerNorm(dim)
        self.ff = FeedForward(dim)

    def forward(self, x: Tensor, context: Tensor | None, mask: Tensor | None) -> Tensor:
        x = x + self.attn1(self.norm1(x))
        x = x + self.attn2(self.norm2(x), context, mask)
        return x + self.ff(self.norm3(x))


class SpatialTransformer(nn.Module):
    """Transformer blocks over the positions of a feature map (Rombach et al. 2022, section 3.3 and appendix E.2.1).

    Args:
        linear_projection: SD 2.x and XL project tokens by linear layers, SD 1.x the map by 1x1 convolutions.
    """

    def __init__(
        self,
        channels: int,
        *,
        num_heads: int,
        head_dim: int,
        num_layers: int,
        cross_attention_dim: int | None,
        groups: int,
        linear_projection: bool,
    ) -> None:
        super().__init__()
        inner = num_heads * head_dim
        self.linear_projection = linear_projection
        self.norm = GroupNorm(groups, channels, eps=1e-6)
        self.proj_in = nn.Linear(channels, inner) if linear_projection else nn.Conv2d(channels, inner, 1)
        self.transformer_blocks = nn.ModuleList(
            [TransformerBlock(inner, num_heads, head_dim, cross_attention_dim) for _ in range(num_layers)]
        )
        self.proj_out = nn.Linear(inner, channels) if linear_projection else nn.Conv2d(inner, channels, 1)
        nn.init.zeros_(self.proj_out.weight)  # starts as the identity (Dhariwal and Nichol 2021)
        nn.init.zeros_(self.proj_out.bias)

    def forward(self, x: Tensor, context: Tensor | None, mask: Tensor | None) -> Tensor:
        """x (B, C, H, W), context (B, M, E) -> (B, C, H, W)."""
        height = x.shape[2]
        h = self.norm(x)
        h = h if self.linear_projection else self.proj_in(h)
        h = h.flatten(2).transpose(1, 2)  # (B, H W, C): a view where x is channels-last
        h = self.proj_in(h) if self.linear_projection else h
        for block in self.transformer_blocks:
            h = block(h, context, mask)
        h = self.proj_out(h) if self.linear_projection else h
        h = h.transpose(1, 2).unflatten(2, (height, -1))  # (B, C, H, W), still channels-last
        return x + (h if self.linear_projection else self.proj_out(h))
