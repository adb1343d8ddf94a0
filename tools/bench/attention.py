"""Attention on a CPU, forward and backward: ours (`sdtrain/layer/flash.py`), three plain products with all scores in
memory, and torch's own kernel.

python tools/bench/attention.py [--precision bf16|fp32]
"""

from __future__ import annotations

import argparse

import torch
from timing import compare, machine
from torch import Tensor
from torch.nn import functional as F

from sdtrain.layer.attention import attend, plain_attention
from sdtrain.ops.memory import keep_freed_memory


def main() -> None:
    """Of 8x8 positions (and of those to 24 tokens), batch 128; of 16x16 and 32x32 (and of those to 77 tokens), batch 4;
    (B, heads, L, M, D).
    """
    parser = argparse.ArgumentParser()
    parser.add_argument("--precision", choices=("bf16", "fp32"), default="bf16")
    dtype = {"bf16": torch.bfloat16, "fp32": torch.float32}[parser.parse_args().precision]
    keep_freed_memory()
    print(f"{machine()}, {dtype}")
    for sizes in (
        (128, 4, 64, 64, 32),
        (128, 4, 64, 24, 32),
        (4, 8, 256, 256, 32),
        (4, 8, 1024, 77, 16),
        (4, 8, 1024, 1024, 16),
        (4, 5, 1024, 1024, 64),
    ):
        batch, heads, length, others, dim = sizes
        shapes = [(batch, n, heads, dim) for n in (length, others, others)]  # as a linear layer gives them
        q, k, v = (torch.randn(s, dtype=dtype).transpose(1, 2).requires_grad_() for s in shapes)

        def run(function: object, q: Tensor = q, k: Tensor = k, v: Tensor = v) -> None:
            function(q, k, v).float().square().mean().backward()

        print(sizes)
        ways = {"ours": attend, "plain": plain_attention, "torch": F.scaled_dot_product_attention}
        compare({name: lambda way=way: run(way) for name, way in ways.items()})


if __name__ == "__main__":
    main()
