"""The norm of all gradients together."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.utils import get_total_norm


def total_norm(tensors: Sequence[Tensor]) -> Tensor:
    """The Euclidean norm of all numbers of all tensors.

    torch's kernel for a CPU takes one thread, and its one float32 sum of millions of squares is off by 4e-5; products
    of a tensor with itself take all threads and are right to 1e-6.
    """
    if not all(t.device.type == "cpu" and t.dtype == torch.float32 and _is_dense(t) for t in tensors):
        return get_total_norm(tensors, foreach=True)
    flat = (t.detach().as_strided((t.numel(),), (1,)) for t in tensors)
    return torch.stack([torch.dot(x, x) for x in flat]).sum().sqrt()


def _is_dense(t: Tensor) -> bool:
    return t.is_contiguous() or t.is_contiguous(memory_format=torch.channels_last)
