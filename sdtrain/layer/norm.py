"""Group normalisation that stays channels-last and fast."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class GroupNorm(nn.GroupNorm):
    """`nn.GroupNorm` (Wu and He 2018), in float32 on a CPU, there and back: 1.2 times as fast as torch's bfloat16
    channels-last kernel (`tools/bench/group_norm.py`). Elsewhere torch decides, whose autocast on
    CUDA takes float32 too.

    (B, C, H, W) channels-last -> channels-last, also where torch answers NCHW (CUDA, until August 2026).
    """

    def forward(self, x: Tensor) -> Tensor:
        if x.device.type == "cpu":
            x = x.float()
            if self.weight.requires_grad and not x.requires_grad:
                # torch 2.13 segfaults in the channels-last backward without a gradient for x
                x = x.detach().requires_grad_()
        y = F.group_norm(x, self.num_groups, self.weight, self.bias, self.eps)
        return y.contiguous(memory_format=torch.channels_last)
