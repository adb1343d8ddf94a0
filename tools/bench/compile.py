"""Compilation by region beside that of the whole network and none: the first step from empty caches, and the steps.

    python tools/bench/compile.py [--model mmdit|unet] [--precision bf16|fp32] [--rounds 5]

`mmdit` is SD3's depth, 24 blocks, at a quarter of its width; `unet` is SD 2's at a tenth. By region, a block whose
like was compiled before costs nothing more, so the bound on a cold start is the share of blocks that are different:
2 of the MMDiT's 24 (the last has no context to pass on), 18 of the U-Net's 38.
A step is forward, MSE in float32, backward and AdamW. A process each; the first step's time is without imports.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
import time
from collections.abc import Callable

import torch
from timing import Contestant, compare, machine, serve
from torch import nn
from torch.nn import functional as F

from sdtrain.model.mmdit import MMDiT
from sdtrain.model.unet import UNet
from sdtrain.ops.compile import compile_regions
from sdtrain.ops.denormal import flush_denormals
from sdtrain.ops.memory import keep_freed_memory
from sdtrain.optim.adamw import AdamW

WIDTH, TOKENS, BATCH, SIDE = 64, 77, 4, 32
NAMES = ("by region", "not compiled", "whole")


def network(model: str) -> nn.Module:
    """The same weights in every process."""
    torch.manual_seed(0)
    if model == "unet":
        widths = {"block_out_channels": (32, 64, 128, 128), "norm_num_groups": 8, "attention_head_dim": (1, 2, 4, 4)}
        return UNet(**widths, cross_attention_dim=WIDTH, use_linear_projection=True)
    return MMDiT(
        sample_size=SIDE,
        in_channels=4,
        out_channels=4,
        num_layers=24,
        num_attention_heads=6,
        joint_attention_dim=WIDTH,
        caption_projection_dim=384,
        pooled_projection_dim=WIDTH,
        pos_embed_max_size=SIDE // 2,
    )


def contestant(model: str, precision: str, name: str) -> Callable[[], None]:
    """A function that takes one training step."""
    keep_freed_memory()
    flush_denormals()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    net = network(model).to(device, memory_format=torch.channels_last)
    os.environ["TORCHINDUCTOR_CACHE_DIR"] = tempfile.mkdtemp()  # of no run before
    if name == "by region":
        compile_regions(net)
    elif name == "whole":
        net.compile()
    x, target = torch.randn(2, BATCH, 4, SIDE, SIDE, device=device)
    cond = {"context": torch.randn(BATCH, TOKENS, WIDTH, device=device)}
    if model == "mmdit":
        cond["pooled"] = torch.randn(BATCH, WIDTH, device=device)
    times = 1000 * torch.rand(BATCH, device=device)
    optimizer, _ = AdamW(lr=1e-6).build({"model": list(net.parameters())}, 1)

    def step() -> None:
        with torch.autocast(device, torch.bfloat16, enabled=precision == "bf16"):
            y = net(x, times, cond)
        F.mse_loss(y.float(), target).backward()
        optimizer.step()
        optimizer.zero_grad()
        if device == "cuda":
            torch.cuda.synchronize()

    return step


def main() -> None:
    """Prints the first step's seconds and the steps' medians."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=("mmdit", "unet"), default="mmdit")
    parser.add_argument("--precision", choices=("bf16", "fp32"), default="bf16")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--alone", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.alone is not None:
        serve(contestant(arguments.model, arguments.precision, arguments.alone))
        return
    print(f"{machine()}, {' '.join(sys.argv[1:]) or 'defaults'}")
    steps = {name: Contestant([*sys.argv, "--alone", name]) for name in NAMES}
    first = {}
    for name, step in steps.items():
        start = time.perf_counter()
        step()
        first[name] = time.perf_counter() - start
        print(f"  {name:44s} {first[name]:9.1f} s to the end of the first step", flush=True)
    medians = compare(steps, rounds=arguments.rounds)
    for step in steps.values():
        step.end()
    print(
        f"  by region: a cold start {first['whole'] / first['by region']:.2f}x as fast as of the whole, "
        f"a step {medians['by region'] / medians['whole'] - 1:+.1%} of its time"
    )


if __name__ == "__main__":
    main()
