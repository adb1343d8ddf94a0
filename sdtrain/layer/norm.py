"""Group normalisation that stays channels-last and fast."""

from __future__ import annotations

from torch import Tensor, nn

from sdtrain.layer.kernels import group_norm


class GroupNorm(nn.GroupNorm):
    """`nn.GroupNorm` (Wu and He 2018), and the SiLU behind it if wanted, in one pass on a CPU (`layer/kernels.py`).

    (B, C, H, W) channels-last -> channels-last, also where torch answers NCHW (CUDA, until August 2026). Where autocast
    is on, the answer has its dtype on a CPU; elsewhere torch decides, whose autocast on CUDA takes float32.
    """

    def __init__(self, num_groups: int, num_channels: int, eps: float = 1e-5, silu: bool = False) -> None:
        super().__init__(num_groups, num_channels, eps)
        self.silu = silu

    def forward(self, x: Tensor) -> Tensor:
        return group_norm(x, self.num_groups, self.weight, self.bias, self.eps, self.silu)
