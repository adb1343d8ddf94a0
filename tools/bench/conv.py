"""3x3 convolutions of small maps on a CPU, both ways: ours, by way of patches, against torch's.

python tools/bench/conv.py
"""

from __future__ import annotations

import torch
from timing import compare, machine
from torch import Tensor
from torch.nn import functional as F

from sdtrain.layer.conv import Conv3x3


def main() -> None:
    """The lowest levels of a U-Net: 512 channels, batch 4, forward and backward, in both precisions."""
    print(machine())
    convolution = Conv3x3(512, 512).to(memory_format=torch.channels_last)
    for dtype in (torch.float32, torch.bfloat16):
        for size in (4, 8):
            x = torch.randn(4, 512, size, size).contiguous(memory_format=torch.channels_last).requires_grad_()

            def run(by_torch: bool, x: Tensor = x, dtype: torch.dtype = dtype) -> None:
                with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
                    weights = convolution.weight, convolution.bias
                    y = F.conv2d(x, *weights, padding=1) if by_torch else convolution(x)
                y.float().square().mean().backward()

            print(f"{size}x{size}, {dtype}")
            compare({"ours": lambda: run(False), "torch": lambda: run(True)})


if __name__ == "__main__":
    main()
