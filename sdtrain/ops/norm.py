"""The norm of all gradients together."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor
from torch.linalg import vector_norm
from torch.nn.utils import get_total_norm

_ROW = 4096  # numbers in a float32 sum: few enough that every CPU's order of adding is right to 5e-7


def total_norm(tensors: Sequence[Tensor]) -> Tensor:
    """The Euclidean norm of all numbers of all tensors.

    torch's kernel for a CPU takes one thread, and its one float32 sum of millions of squares is off by 4e-5 (MKL's dot
    product by 1e-5 on an AMD). Rows take all threads, whose number they do not depend on, and are right to 5e-7.
    """
    if not all(t.device.type == "cpu" and t.dtype == torch.float32 and _is_dense(t) for t in tensors):
        return get_total_norm(tensors, foreach=True)
    norms = [vector_norm(rows, dim=1) for t in tensors for rows in _rows(t.detach())]
    return vector_norm(torch.cat(norms), dtype=torch.float64).float()


def _rows(t: Tensor) -> Iterator[Tensor]:
    """The numbers of `t` as they lie, shape (n, _ROW), and those left over, shape (1, fewer)."""
    whole, rest = divmod(t.numel(), _ROW)
    if whole:
        yield t.as_strided((whole, _ROW), (_ROW, 1))
    if rest:
        yield t.as_strided((1, rest), (rest, 1), t.storage_offset() + whole * _ROW)


def _is_dense(t: Tensor) -> bool:
    return t.is_contiguous() or t.is_contiguous(memory_format=torch.channels_last)
