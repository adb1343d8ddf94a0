"""A training step of our KL autoencoder beside diffusers', in one process, same weights, same loss, A B A B.

    python tools/bench/vae.py [--precision bf16|fp32] [--size 128] [--batch 2] [--rounds 5]

Width (64, 128, 256, 256), two residual blocks a level. A step is encode, a draw, decode, L1 and KL, backward, AdamW.
Peers: diffusers' `AutoencoderKL` as its training script runs it (NCHW, AdamW as torch makes it), and tuned by hand
(channels-last, fused AdamW).
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable

import torch
from diffusers import AutoencoderKL as Peer
from timing import compare, machine, matmul_peak
from torch.utils.flop_counter import FlopCounterMode

from sdtrain.first_stage.autoencoder_kl import AutoencoderKL
from sdtrain.ops.memory import keep_freed_memory

OURS = {"block_out_channels": (64, 128, 256, 256), "layers_per_block": 2}
BLOCKS = {"down_block_types": ("DownEncoderBlock2D",) * 4, "up_block_types": ("UpDecoderBlock2D",) * 4}


def contestant(name: str, image: torch.Tensor, is_bf16: bool) -> Callable[[], None]:
    """A function that takes one training step, from the weights of seed 0 in every contestant."""
    torch.manual_seed(0)
    ours = AutoencoderKL(**OURS)
    net = ours if name == "sdtrain" else Peer(**OURS, **BLOCKS)
    net.load_state_dict(ours.state_dict())
    is_shipped = "shipped" in name
    if not is_shipped:
        net.to(memory_format=torch.channels_last)
        image = image.contiguous(memory_format=torch.channels_last)
    optimizer = torch.optim.AdamW(net.parameters(), lr=1e-6, fused=None if is_shipped else True)
    device = image.device.type

    def step() -> None:
        with torch.autocast(device, torch.bfloat16, enabled=is_bf16):
            posterior = net.encode(image) if name == "sdtrain" else net.encode(image).latent_dist
            latent = posterior.mean + posterior.std * torch.randn_like(posterior.std)
            made = net.decode(latent) if name == "sdtrain" else net.decode(latent).sample
        variance = posterior.std.float().square()
        kl = 0.5 * (posterior.mean.float().square() + variance - 1.0 - variance.log()).mean()
        ((made.float() - image).abs().mean() + 1e-6 * kl).backward()
        optimizer.step()
        optimizer.zero_grad()
        if device == "cuda":
            torch.cuda.synchronize()

    return step


def main() -> None:
    """Prints medians, ratios and shares of the peak."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--precision", choices=("bf16", "fp32"), default="bf16")
    parser.add_argument("--size", type=int, default=128)
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=5)
    arguments = parser.parse_args()
    keep_freed_memory()  # as `python -m sdtrain` does; the peers in this process gain by it too
    device, is_bf16 = "cuda" if torch.cuda.is_available() else "cpu", arguments.precision == "bf16"
    image = torch.rand(arguments.batch, 3, arguments.size, arguments.size, device=device) * 2 - 1
    print(f"{machine()}, {' '.join(sys.argv[1:]) or 'defaults'}")
    with torch.device(device):
        names = ("sdtrain", "diffusers, tuned", "diffusers, as shipped")
        medians = compare({name: contestant(name, image, is_bf16) for name in names}, rounds=arguments.rounds)
    with torch.device("meta"), FlopCounterMode(display=False) as counter:
        net = AutoencoderKL(**OURS)
        net.decode(net.encode(torch.empty(1, 3, arguments.size, arguments.size)).mean)
    flops = 3 * arguments.batch * counter.get_total_flops()
    peak = matmul_peak(torch.bfloat16 if is_bf16 else torch.float32)
    for name, seconds in medians.items():
        print(
            f"  {name:44s} {arguments.batch / seconds:7.2f} images/s, {flops / seconds / peak:6.1%} of the matmul peak"
        )


if __name__ == "__main__":
    main()
