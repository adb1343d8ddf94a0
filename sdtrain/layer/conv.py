"""Convolutions as matrix products, where that is the faster way."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class Conv1x1(nn.Conv2d):
    """A 1x1 convolution over channels that stand last, (..., C) -> (..., C'): a linear layer with a convolution's
    parameters.
    """

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__(in_channels, out_channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight.permute(0, 2, 3, 1).flatten(1), self.bias)  # so its gradient is channels-last


class Conv3x3(nn.Conv2d):
    """A 3x3 convolution, padded by 1.

    On a CPU, where there are no more positions than output channels, it is a product over patches: oneDNN reorders the
    weights at every call, and then took 1.4 to 2 times as long (`tools/bench/conv.py`).
    """

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__(in_channels, out_channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        if x.device.type != "cpu" or x.shape[0] * x.shape[2] * x.shape[3] > self.out_channels:
            return super().forward(x)
        if torch.is_autocast_enabled("cpu"):
            x = x.to(torch.get_autocast_dtype("cpu"))  # before there are nine of each
        patches = _Patches.apply(x.permute(0, 2, 3, 1))  # (B, H, W, 9 C)
        weight = self.weight.permute(0, 2, 3, 1).flatten(1)  # (C', 9 C): a view, as the weights are channels-last
        return F.linear(patches, weight, self.bias).permute(0, 3, 1, 2)  # (B, C', H, W), channels-last


class _Patches(torch.autograd.Function):
    """(B, H, W, C) -> (B, H, W, 9 C): each position's neighbourhood, row by row, zeros around the map."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:  # noqa: ANN401, ARG004 torch's context
        padded = F.pad(x, (0, 0, 1, 1, 1, 1))  # (B, H + 2, W + 2, C)
        b, h, w, c = padded.stride()
        return padded.as_strided((*x.shape[:3], 3, 3, x.shape[3]), (b, h, w, h, w, c)).flatten(3)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:  # noqa: ANN401, ARG004
        batch, height, width, _ = grad.shape
        parts = grad.unflatten(3, (9, -1))  # (B, H, W, 9, C)
        sum_dtype = torch.promote_types(grad.dtype, torch.float32)
        padded = grad.new_zeros(batch, height + 2, width + 2, parts.shape[4], dtype=sum_dtype)
        for i in range(9):
            row, column = divmod(i, 3)
            padded[:, row : row + height, column : column + width] += parts[..., i, :]
        return padded[:, 1:-1, 1:-1].to(grad.dtype)
