"""Attention on a CPU, there and back without keeping the scores: in bfloat16 with matrix tiles (AMX, `flash_bf16.c`),
in float32 with AVX-512 (`flash_f32.c`).

It is faster than torch's kernel and than plain products, and as near to float64 (`tools/bench/attention.py`).
"""

from __future__ import annotations

from collections.abc import Sequence
from ctypes import c_float, c_int64, c_void_p
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from sdtrain.layer.kernels import library

_DTYPES = {torch.bfloat16: "bf16", torch.float32: "f32"}


def fits(q: Tensor, k: Tensor, v: Tensor) -> bool:
    """Whether `flash_attention` takes queries (B, heads, L, D), keys and values."""
    return (
        q.device.type == "cpu"
        and q.dtype in _DTYPES
        and q.dtype == k.dtype == v.dtype
        and not torch.compiler.is_compiling()
        and q.shape[3] % 16 == 0
        and (q.dtype == torch.bfloat16 or q.shape[3] <= 64)  # wider, torch's products in float32 are as fast
        and q.shape[0] * q.shape[1] >= torch.get_num_threads()  # a head is one thread's
        and _is_here(_DTYPES[q.dtype])
    )


def flash_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """softmax(q k^T / sqrt(D)) v (Dao et al. 2022) in the precision of all three.

    q (B, heads, L, D), k and v (B, heads, M, D), D a multiple of 16 -> (B, heads, L, D). All lie as (B, L, heads, D),
    as a linear layer gives them.
    """
    return _FlashAttention.apply(q, k, v)


@cache
def _is_here(dtype: str) -> bool:
    return library() is not None and bool(getattr(library(), f"flash_{dtype}_is_here")())


class _FlashAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:  # noqa: ANN401 torch's context
        q, k, v = (x.transpose(1, 2).contiguous() for x in (q, k, v))
        y, logsum = torch.empty_like(q), torch.empty(q.shape[0], q.shape[2], q.shape[1])
        _call("forward", (q, k, v, y, logsum))
        ctx.save_for_backward(q, k, v, y, logsum)
        return y.transpose(1, 2)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, ...]:  # noqa: ANN401
        q, k, v, y, logsum = ctx.saved_tensors
        wanted = [torch.empty_like(x) for x in (q, k, v)]
        _call("backward", (q, k, v, dy.transpose(1, 2).contiguous(), y, logsum, *wanted))
        return tuple(x.transpose(1, 2) for x in wanted)


def _call(way: str, tensors: Sequence[Tensor]) -> None:
    """The first is q (B, L, heads, D), the second k."""
    (batch, length, heads, dim), others = tensors[0].shape, tensors[1].shape[1]
    getattr(library(), f"flash_{_DTYPES[tensors[0].dtype]}_{way}")(
        *(c_void_p(x.data_ptr()) for x in tensors),
        *map(c_int64, (batch, heads, length, others, dim)),
        c_float(dim**-0.5),
        torch.get_num_threads(),
    )
