"""Convolutions as matrix products, where that is the faster way."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class Conv1x1(nn.Conv2d):
    """A 1x1 convolution over channels that stand last, (..., C) -> (..., C'): a linear layer with a convolution's
    parameters. On a CPU it gives the same bits with any number of threads, which oneDNN's convolution does not.
    """

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__(in_channels, out_channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight.permute(0, 2, 3, 1).flatten(1), self.bias)  # so its gradient is channels-last

    def of_map(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, C', H, W)."""
        return self(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


class Conv3x3(nn.Conv2d):
    """A 3x3 convolution, padded by 1.

    On a CPU, where there are no more positions than output channels, it is a product over patches: oneDNN reorders the
    weights at every call, and then took 1.4 to 2 times as long (`tools/bench/conv.py`). Not where it is compiled:
    of the patches' sums Inductor makes 50,000 lines of C++ a block, and such in bfloat16 as do not compile.
    """

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__(in_channels, out_channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        many = x.shape[0] * x.shape[2] * x.shape[3] > self.out_channels
        if many or x.device.type != "cpu" or torch.compiler.is_compiling():
            return super().forward(x)
        weight = self.weight.permute(0, 2, 3, 1).flatten(1)  # (C', 9 C): a view, as the weights are channels-last
        given = (x.permute(0, 2, 3, 1), weight, self.bias)
        if torch.is_autocast_enabled("cpu"):
            given = (tensor.to(torch.get_autocast_dtype("cpu")) for tensor in given)
        return _PatchProduct.apply(*given).permute(0, 3, 1, 2)  # (B, C', H, W), channels-last


class _PatchProduct(torch.autograd.Function):
    """x (B, H, W, C), weight (C', 9 C), bias (C') -> (B, H, W, C'). Patches are made again on the way back: they take
    nine times the memory of what they are made of.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:  # noqa: ANN401 torch's context
        ctx.save_for_backward(x, weight)
        return F.linear(_patches(x), weight, bias)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # noqa: ANN401
        x, weight = ctx.saved_tensors
        rows = grad.flatten(0, 2)  # (B H W, C')
        of_x = _fold(grad @ weight) if ctx.needs_input_grad[0] else None
        of_weight = rows.T @ _patches(x).flatten(0, 2) if ctx.needs_input_grad[1] else None
        return of_x, of_weight, rows.sum(0)


def _patches(x: Tensor) -> Tensor:
    """(B, H, W, C) -> (B, H, W, 9 C): each position's neighbourhood, row by row, zeros around the map."""
    padded = F.pad(x, (0, 0, 1, 1, 1, 1))  # (B, H + 2, W + 2, C)
    b, h, w, c = padded.stride()
    return padded.as_strided((*x.shape[:3], 3, 3, x.shape[3]), (b, h, w, h, w, c)).flatten(3)


def _fold(grad: Tensor) -> Tensor:
    """Of patches (B, H, W, 9 C), each position's sum over all that hold it, (B, H, W, C)."""
    batch, height, width, _ = grad.shape
    parts = grad.unflatten(3, (9, -1))  # (B, H, W, 9, C)
    sum_dtype = torch.promote_types(grad.dtype, torch.float32)
    padded = grad.new_zeros(batch, height + 2, width + 2, parts.shape[4], dtype=sum_dtype)
    for i in range(9):
        row, column = divmod(i, 3)
        padded[:, row : row + height, column : column + width] += parts[..., i, :]
    return padded[:, 1:-1, 1:-1].to(grad.dtype)
