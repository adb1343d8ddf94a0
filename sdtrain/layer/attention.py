"""Attention and the transformer block of the U-Net, with the parameter names of diffusers."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sdtrain.layer.conv import Conv1x1
from sdtrain.layer.flash import fits, flash_attention
from sdtrain.layer.kernels import geglu
from sdtrain.layer.norm import GroupNorm


def attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
    """Scaled dot-product attention over (B, heads, L, D); mask broadcasts, True = attend.

    On a CPU without a mask ours is taken where the processor has what it is built of. Where it is not, torch's flash
    backward in bfloat16 took 4 times as long as plain products at the lengths of small latents, so there they are
    taken, up to 2^17 scores a head: beyond, memory counts (`tools/bench/attention.py`).
    """
    if mask is None and fits(q, k, v):
        return flash_attention(q, k, v)
    if q.device.type == "cpu" and q.element_size() <= 2 and q.shape[-2] * k.shape[-2] <= 2**17:
        return plain_attention(q, k, v, mask)
    return F.scaled_dot_product_attention(q, k, v, mask)


def plain_attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
    """`attend` with all scores in memory at once.

    Keys are filled up to a multiple of 32: torch's softmax in bfloat16 takes 5 times as long over 24 as over 32.
    """
    shape, num_missing = q.shape[:3], -k.shape[2] % 32
    if num_missing and mask is None:
        mask = q.new_ones((1, 1, 1, k.shape[2]), dtype=torch.bool)
    if mask is None:
        bias = q.new_zeros(1)
    else:  # the least there is, not minus infinity: nothing to attend to must not be NaN
        bias = q.new_zeros(mask.shape).masked_fill_(~mask, torch.finfo(q.dtype).min)
        bias = F.pad(bias, (0, num_missing), value=-torch.inf)
        bias = bias.expand(*shape[:2], -1, -1).flatten(0, 1)  # (B heads, 1 or L, M)
        k, v = (F.pad(y, (0, 0, 0, num_missing)) for y in (k, v))
    q, k, v = (y.flatten(0, 1) for y in (q, k, v))  # (B heads, L, D)
    scores = torch.baddbmm(bias, q, k.transpose(1, 2), beta=int(mask is not None), alpha=q.shape[2] ** -0.5)
    return torch.bmm(scores.softmax(dim=-1).to(v.dtype), v).unflatten(0, shape[:2])  # (B, heads, L, D)


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
        return geglu(self.proj(x))


class FeedForward(nn.Module):
    """GEGLU and a linear layer, four times as wide inside."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.net = nn.ModuleList([GEGLU(dim, dim * 4), nn.Dropout(0.0), nn.Linear(dim * 4, dim)])

    def forward(self, x: Tensor) -> Tensor:
        return self.net[2](self.net[0](x))


class TransformerBlock(nn.Module):
    """Self-attention, cross-attention, feed-forward, each behind a LayerNorm and inside a residual.

    Args:
        only_cross_attention: the first attention reads the context as well.
    """

    def __init__(
        self,
        dim: int,
        *,
        num_heads: int,
        head_dim: int,
        cross_attention_dim: int | None,
        only_cross_attention: bool = False,
    ) -> None:
        super().__init__()
        heads = {"num_heads": num_heads, "head_dim": head_dim}
        self.only_cross_attention = only_cross_attention
        self.norm1 = nn.LayerNorm(dim)
        self.attn1 = Attention(dim, cross_attention_dim=cross_attention_dim if only_cross_attention else None, **heads)
        self.norm2 = nn.LayerNorm(dim)
        self.attn2 = Attention(dim, cross_attention_dim=cross_attention_dim, **heads)
        self.norm3 = nn.LayerNorm(dim)
        self.ff = FeedForward(dim)

    def forward(self, x: Tensor, context: Tensor | None, mask: Tensor | None) -> Tensor:
        read = (context, mask) if self.only_cross_attention else ()
        x = x + self.attn1(self.norm1(x), *read)
        x = x + self.attn2(self.norm2(x), context, mask)
        return x + self.ff(self.norm3(x))


class SpatialTransformer(nn.Module):
    """Transformer blocks over the positions of a feature map (Rombach et al. 2022, section 3.3 and appendix E.2.1).

    Args:
        linear_projection: SD 2.x and XL store the two projections as linear layers, SD 1.x as 1x1 convolutions.
        only_cross_attention: no attention among the positions (SD's x4 upscaler).
    """

    is_region = True  # for ops/compile.py

    def __init__(
        self,
        channels: int,
        *,
        num_heads: int,
        num_layers: int,
        cross_attention_dim: int | None,
        groups: int,
        linear_projection: bool,
        only_cross_attention: bool = False,
    ) -> None:
        super().__init__()
        head_dim = channels // num_heads
        inner = num_heads * head_dim
        projection = nn.Linear if linear_projection else Conv1x1
        self.norm = GroupNorm(groups, channels, eps=1e-6)
        self.proj_in = projection(channels, inner)
        self.transformer_blocks = nn.ModuleList(
            [
                TransformerBlock(
                    inner,
                    num_heads=num_heads,
                    head_dim=head_dim,
                    cross_attention_dim=cross_attention_dim,
                    only_cross_attention=only_cross_attention,
                )
                for _ in range(num_layers)
            ]
        )
        self.proj_out = projection(inner, channels)
        nn.init.zeros_(self.proj_out.weight)  # starts as the identity (Dhariwal and Nichol 2021)
        nn.init.zeros_(self.proj_out.bias)

    def forward(self, x: Tensor, context: Tensor | None, mask: Tensor | None) -> Tensor:
        """x (B, C, H, W), context (B, M, E) -> (B, C, H, W)."""
        tokens = self.norm(x).permute(0, 2, 3, 1).flatten(1, 2)  # (B, H W, C): a view, as maps are channels-last
        tokens = self.proj_in(tokens)
        for block in self.transformer_blocks:
            tokens = block(tokens, context, mask)
        tokens = self.proj_out(tokens).unflatten(1, x.shape[2:])  # (B, H, W, C)
        return x + tokens.permute(0, 3, 1, 2)  # (B, C, H, W), still channels-last
