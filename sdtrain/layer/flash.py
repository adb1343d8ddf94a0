"""Attention whose gradients are made in one pass on a CPU with matrix tiles (AMX): `flash.c`.

The way there is torch's flash kernel. There and back by torch in bfloat16 took 1.9 to 2.5 times as long over 1024
positions, at heads of 64 and 16 (`tools/bench/attention.py`), and was less exact.
"""

from __future__ import annotations

from ctypes import c_float, c_int64, c_void_p
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from sdtrain.layer.kernels import library


def fits(q: Tensor, k: Tensor) -> bool:
    """Whether `flash_attention` takes these, (B, heads, L, D) and (B, heads, M, D)."""
    return (
        q.device.type == "cpu"
        and q.dtype == torch.bfloat16
        and not torch.compiler.is_compiling()
        and q.shape[2] % 32 == k.shape[2] % 32 == q.shape[3] % 16 == 0
        and q.shape[0] * q.shape[1] >= torch.get_num_threads()  # a head is one thread's
        and _has_tiles()
    )


def flash_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """softmax(q k^T / sqrt(D)) v in bfloat16 (Dao et al. 2022): q (B, heads, L, D), k and v (B, heads, M, D), L and M
    multiples of 32 and D of 16 -> (B, heads, L, D).
    """
    return _FlashAttention.apply(q, k, v)


@cache
def _has_tiles() -> bool:
    return library() is not None and bool(library().flash_is_here())


class _FlashAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:  # noqa: ANN401 torch's context
        y, logsum = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(q, k, v)
        ctx.save_for_backward(q, k, v, y, logsum)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, ...]:  # noqa: ANN401
        q, k, v, y, logsum = ctx.saved_tensors
        delta = torch.linalg.vecdot(dy.float(), y.float())  # (B, heads, L)
        given = [x.contiguous() for x in (q, k, v, dy, logsum, delta)]
        wanted = [torch.empty_like(x) for x in given[:3]]
        batch, heads, length, dim = q.shape
        library().flash_backward(
            *(c_void_p(x.data_ptr()) for x in (*given, *wanted)),
            *map(c_int64, (batch * heads, length, k.shape[2], dim)),
            c_float(dim**-0.5),
            torch.get_num_threads(),
        )
        return tuple(wanted)
