"""Joint attention over picture and text tokens, and its transformer block (Esser et al. 2024, figure 2), with the
parameter names of diffusers.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sdtrain.layer.attention import attend


def modulate(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """LayerNorm whose scale and shift (B, 1, D) come from outside: x (B, L, D) -> (B, L, D)."""
    return torch.addcmul(shift, F.layer_norm(x, x.shape[-1:], eps=1e-6), 1 + scale)


class Modulation(nn.Module):
    """Shifts, scales and gates of a block from the timestep embedding, by one product. It starts at zero, so that a
    gated block starts as the identity (adaLN-Zero, Peebles and Xie 2023, section 3.2).
    """

    def __init__(self, dim: int, num_parts: int) -> None:
        super().__init__()
        self.num_parts = num_parts
        self.linear = nn.Linear(dim, num_parts * dim)

    def forward(self, temb: Tensor) -> tuple[Tensor, ...]:
        """temb (B, D) after its SiLU -> num_parts of (B, 1, D)."""
        return self.linear(temb)[:, None].chunk(self.num_parts, dim=-1)


class _RMSNorm(torch.autograd.Function):
    """Root-mean-square norm over the last dimension in few passes, which on a CPU is what it costs."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:  # noqa: ANN401 torch's context
        power = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=torch.float32).square_().div_(x.shape[-1])
        inverse = power.add_(eps).rsqrt_().to(x.dtype)
        normed = x * inverse
        ctx.save_for_backward(normed, inverse, weight)
        return normed * weight

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:  # noqa: ANN401
        normed, inverse, weight = ctx.saved_tensors
        product = grad * normed
        along = (product @ weight)[..., None].div_(-grad.shape[-1])
        return torch.addcmul(grad * weight, normed, along).mul_(inverse), product.flatten(0, -2).sum(0), None


class RMSNorm(nn.RMSNorm):
    """`nn.RMSNorm` (Zhang and Sennrich 2019) that answers in the precision it was asked in."""

    def forward(self, x: Tensor) -> Tensor:
        weight = self.weight.to(x.dtype)
        if x.device.type == "cpu":
            return _RMSNorm.apply(x, weight, self.eps)
        return F.rms_norm(x, self.normalized_shape, weight, self.eps).to(x.dtype)


class JointAttention(nn.Module):
    """One attention over the tokens of both streams, each with projections of its own.

    Args:
        qk_norm: normalise queries and keys of each head by their root mean square, so that attention cannot overflow
            (Esser et al. 2024, section 5.3.2).
        context: "both" reads the text and answers to it; "read" only reads it; "none" is attention of the picture
            alone.
    """

    def __init__(self, dim: int, num_heads: int, *, qk_norm: bool, context: Literal["both", "read", "none"]) -> None:
        super().__init__()
        self.num_heads = num_heads

        def norm() -> nn.Module:
            return RMSNorm(dim // num_heads, eps=1e-6) if qk_norm else nn.Identity()

        self.norm_q, self.norm_k = norm(), norm()
        self.to_q, self.to_k, self.to_v = (nn.Linear(dim, dim) for _ in range(3))
        self.to_out = nn.ModuleList([nn.Linear(dim, dim), nn.Dropout(0.0)])
        if context != "none":
            self.norm_added_q, self.norm_added_k = norm(), norm()
            self.add_q_proj, self.add_k_proj, self.add_v_proj = (nn.Linear(dim, dim) for _ in range(3))
        if context == "both":
            self.to_add_out = nn.Linear(dim, dim)

    def _heads(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (self.num_heads, -1))  # (B, L, heads, D / heads)

    def forward(self, x: Tensor, context: Tensor | None = None, mask: Tensor | None = None) -> tuple[Tensor, ...]:
        """x (B, L, D), context (B, M, D), mask (B, 1, 1, L + M) bool with True = attend -> the like of x, and of the
        context where it is answered.
        """
        heads, length = self._heads, x.shape[1]
        q, k, v = self.norm_q(heads(self.to_q(x))), self.norm_k(heads(self.to_k(x))), heads(self.to_v(x))
        if context is not None:
            q = torch.cat((q, self.norm_added_q(heads(self.add_q_proj(context)))), dim=1)
            k = torch.cat((k, self.norm_added_k(heads(self.add_k_proj(context)))), dim=1)
            v = torch.cat((v, heads(self.add_v_proj(context))), dim=1)
        q, k, v = (y.transpose(1, 2) for y in (q, k, v))  # (B, heads, L + M, D / heads)
        attended = attend(q, k, v, mask).transpose(1, 2).flatten(2)  # (B, L + M, D)
        answers = [self.to_out[0](attended[:, :length])]
        if hasattr(self, "to_add_out"):
            answers.append(self.to_add_out(attended[:, length:]))
        return tuple(answers)


class _Gelu(nn.Module):
    """linear, GELU in its tanh form (Hendrycks and Gimpel 2016)."""

    def __init__(self, dim: int, inner: int) -> None:
        super().__init__()
        self.proj = nn.Linear(dim, inner)

    def forward(self, x: Tensor) -> Tensor:
        x = self.proj(x)
        # On a CPU in bfloat16 torch's tanh form is slow. The exact one differs by 5e-4 at most, as rounding x does.
        exact = x.device.type == "cpu" and x.dtype == torch.bfloat16
        return F.gelu(x, approximate="none" if exact else "tanh")


class FeedForward(nn.Module):
    """linear, GELU, linear, four times as wide inside."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.net = nn.ModuleList([_Gelu(dim, dim * 4), nn.Dropout(0.0), nn.Linear(dim * 4, dim)])

    def forward(self, x: Tensor) -> Tensor:
        return self.net[2](self.net[0](x))


class JointBlock(nn.Module):
    """Joint attention, then a feed-forward a stream; each behind a modulated LayerNorm, inside a gated residual.

    Args:
        last: the text's stream ends here: it is read, and not written.
        dual_attention: a second attention of the picture alone beside the joint one (SD3.5-medium).
    """

    is_region = True  # for ops/compile.py

    def __init__(self, dim: int, num_heads: int, *, qk_norm: bool, last: bool, dual_attention: bool) -> None:
        super().__init__()
        self.last, self.dual_attention = last, dual_attention
        self.norm1 = Modulation(dim, 9 if dual_attention else 6)
        self.norm1_context = Modulation(dim, 2 if last else 6)
        self.attn = JointAttention(dim, num_heads, qk_norm=qk_norm, context="read" if last else "both")
        if dual_attention:
            self.attn2 = JointAttention(dim, num_heads, qk_norm=qk_norm, context="none")
        self.ff = FeedForward(dim)
        if not last:
            self.ff_context = FeedForward(dim)

    def forward(self, x: Tensor, context: Tensor, temb: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor]:
        """x (B, L, D), context (B, M, D), temb (B, D) after its SiLU, mask as `JointAttention`'s -> both."""
        shift, scale, gate, ff_shift, ff_scale, ff_gate, *second = self.norm1(temb)
        told = self.norm1_context(temb)
        # diffusers' last block keeps the text's scale before its shift
        context_shift, context_scale = (told[1], told[0]) if self.last else told[:2]
        normed = F.layer_norm(x, x.shape[-1:], eps=1e-6)
        answers = self.attn(
            torch.addcmul(shift, normed, 1 + scale), modulate(context, context_shift, context_scale), mask
        )
        x = torch.addcmul(x, gate, answers[0])
        if self.dual_attention:
            shift, scale, gate = second
            x = torch.addcmul(x, gate, self.attn2(torch.addcmul(shift, normed, 1 + scale))[0])
        x = torch.addcmul(x, ff_gate, self.ff(modulate(x, ff_shift, ff_scale)))
        if not self.last:
            context = torch.addcmul(context, told[2], answers[1])
            context = torch.addcmul(context, told[5], self.ff_context(modulate(context, told[3], told[4])))
        return x, context
