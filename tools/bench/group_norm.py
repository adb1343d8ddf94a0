"""Group normalisation of a channels-last bfloat16 map on a CPU, both ways: ours, by way of float32, against torch's.

python tools/bench/group_norm.py
"""

from __future__ import annotations

import torch
from timing import compare, machine
from torch import nn

from sdtrain.layer.norm import GroupNorm


def main() -> None:
    """128 pictures of 128 channels at 16x16, 16 groups."""
    print(machine())
    x = torch.randn(128, 128, 16, 16, dtype=torch.bfloat16).contiguous(memory_format=torch.channels_last)
    x.requires_grad_()
    norms = {"ours": GroupNorm(16, 128), "torch": nn.GroupNorm(16, 128)}
    compare({name: lambda m=m: m(x).to(torch.bfloat16).sum().backward() for name, m in norms.items()})


if __name__ == "__main__":
    main()
