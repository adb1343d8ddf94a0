"""A training step of our U-Net beside diffusers' on the CPU, same weights, same loss, A B A B.

    python tools/bench/unet.py [--precision bf16|fp32]

The peer is `UNet2DConditionModel` as its training scripts run it: contiguous (NCHW), eager, autocast for bf16.
"""

from __future__ import annotations

import argparse

import torch
from diffusers import UNet2DConditionModel
from timing import compare, machine, matmul_peak
from torch.utils.flop_counter import FlopCounterMode

from sdtrain.model.unet import UNet

QUICKSTART = {
    "in_channels": 4,
    "out_channels": 4,
    "block_out_channels": (96, 192),
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
    "layers_per_block": 1,
    "cross_attention_dim": 192,
    "attention_head_dim": (3, 6),
    "use_linear_projection": True,
    "norm_num_groups": 16,
}


def main() -> None:
    """The quickstart's U-Net: 16x16 latents, batch 128, 24 tokens."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--precision", choices=("bf16", "fp32"), default="bf16")
    precision = parser.parse_args().precision
    torch.manual_seed(0)
    ours, peer = UNet(**QUICKSTART), UNet2DConditionModel(**QUICKSTART)
    peer.load_state_dict(ours.state_dict())
    x, time, context = torch.randn(128, 4, 16, 16), torch.rand(128) * 1000, torch.randn(128, 24, 192)

    def step(which: str) -> None:
        with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
            y = ours(x, time, {"context": context}) if which == "ours" else peer(x, time, context).sample
        (y.float() - x).square().mean().backward()
        (ours if which == "ours" else peer).zero_grad()

    print(f"{machine()}, {precision}")
    medians = compare({"sdtrain": lambda: step("ours"), "diffusers": lambda: step("peer")}, rounds=5)
    with FlopCounterMode(display=False) as counter:
        ours(x[:1], time[:1], {"context": context[:1]})
    flops = 3 * 128 * counter.get_total_flops()
    peak = matmul_peak(torch.bfloat16 if precision == "bf16" else torch.float32)
    for name, seconds in medians.items():
        print(f"  {name:12s} {128 / seconds:7.1f} images/s, {flops / seconds / peak:6.1%} of {peak / 1e12:.2f} TFLOP/s")


if __name__ == "__main__":
    main()
