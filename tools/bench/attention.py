"""Attention at the lengths of small latents, both ways, on a CPU: three plain products against torch's own kernel.

python tools/bench/attention.py
"""

from __future__ import annotations

import torch
from timing import compare, machine
from torch import Tensor
from torch.nn import functional as F

from sdtrain.layer.attention import attend


def main() -> None:
    """Self-attention over 8x8 positions and cross-attention to 24 tokens, batch 128, 4 heads of 32, bfloat16."""
    print(machine())
    for name, keys in (("self-attention 64 x 64", 64), ("cross-attention 64 x 24", 24)):
        q, k, v = (torch.randn(128, 4, n, 32, dtype=torch.bfloat16, requires_grad=True) for n in (64, keys, keys))

        def run(function: object, q: Tensor = q, k: Tensor = k, v: Tensor = v) -> None:
            function(q, k, v).float().square().mean().backward()

        print(name)
        compare({"ours": lambda: run(attend), "torch": lambda: run(F.scaled_dot_product_attention)})


if __name__ == "__main__":
    main()
