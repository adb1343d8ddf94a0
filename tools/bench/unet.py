"""A training step of our U-Net beside diffusers', in turn (A B A B), same weights, same loss, a process each.

    python tools/bench/unet.py [--precision bf16|fp32] [--rounds 5] [--compiled|--denormals] [--size 32] [--batch 4]
        [--model small|tiny|sd2]

Peers: `UNet2DConditionModel` as diffusers' training scripts run it (NCHW, eager, AdamW as torch makes it), and the same
tuned by hand (channels-last, fused AdamW); with --compiled, that one compiled whole beside ours by region, and the time
to the end of the first step from empty caches.
A step is forward, MSE in float32, backward, clip and AdamW, with autocast for bf16. The share of the measured matmul
peak and the process's peak memory stand beside every figure. A process each, because a run's own settings (memory kept,
denormals flushed) hold for all in a process: in one with us the peers would have them too.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from diffusers import UNet2DConditionModel
from safetensors.torch import load_file, save_file
from timing import Contestant, compare, machine, matmul_peak, serve
from torch import nn
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from sdtrain.model.unet import UNet
from sdtrain.ops.compile import compile_regions
from sdtrain.ops.denormal import flush_denormals
from sdtrain.ops.memory import keep_freed_memory
from sdtrain.ops.norm import total_norm
from sdtrain.optim.adamw import AdamW

MODELS = {
    "small": {"block_out_channels": (128, 256, 512, 512), "cross_attention_dim": 768, "attention_head_dim": 8},
    "tiny": {
        "block_out_channels": (64, 128),
        "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
        "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
        "cross_attention_dim": 64,
    },
    "sd2": {
        "cross_attention_dim": 1024,
        "attention_head_dim": (5, 10, 20, 20),
        "use_linear_projection": True,
        "in_channels": 4,
        "out_channels": 4,
    },
}
TOKENS = 77


class Bench:
    """One shape of input, and the steps of each contestant on it."""

    def __init__(self, arguments: argparse.Namespace) -> None:
        self.config, self.batch = MODELS[arguments.model], arguments.batch
        self.device = "cuda" if torch.cuda.is_available() else "cpu"
        self.is_bf16 = arguments.precision == "bf16"
        generator = torch.Generator().manual_seed(0)
        side, width = arguments.size, self.config["cross_attention_dim"]
        shapes = ((self.batch, 4, side, side), (self.batch, 4, side, side), (self.batch, TOKENS, width))
        self.x, self.target, self.context = (torch.randn(s, generator=generator).to(self.device) for s in shapes)
        self.time = (torch.rand(self.batch, generator=generator) * 1000).to(self.device)

    def contestant(self, name: str, weights: str) -> Callable[[], None]:
        """A function that takes one training step from the weights in a file; ours is set up as a run's process is."""
        if "sdtrain" in name:
            keep_freed_memory()
            if "denormals" not in name:
                flush_denormals()
        with torch.device(self.device):
            net: nn.Module = UNet(**self.config) if "sdtrain" in name else UNet2DConditionModel(**self.config)
        net.load_state_dict(load_file(weights))
        if "shipped" not in name:
            net.to(memory_format=torch.channels_last)
        if "compiled" in name:
            os.environ["TORCHINDUCTOR_CACHE_DIR"] = tempfile.mkdtemp(dir=Path(weights).parent)  # of no run before
            compile_regions(net) if "sdtrain" in name else net.compile()
        parameters = list(net.parameters())
        if "sdtrain" in name:
            optimizer, _ = AdamW(lr=1e-6).build({"model": parameters}, 1)
        else:
            optimizer = torch.optim.AdamW(parameters, lr=1e-6, fused=None if "shipped" in name else True)
        x = self.x if "shipped" in name else self.x.contiguous(memory_format=torch.channels_last)

        def step() -> None:
            with torch.autocast(self.device, torch.bfloat16, enabled=self.is_bf16):
                if "sdtrain" in name:
                    y = net(x, self.time, {"context": self.context})
                else:
                    y = net(x, self.time, self.context).sample
            F.mse_loss(y.float(), self.target).backward()
            if "sdtrain" in name:
                optimizer.clip({"model": total_norm([p.grad for p in parameters])}, 1.0)
            else:
                torch.nn.utils.clip_grad_norm_(parameters, 1.0)
            optimizer.step()
            optimizer.zero_grad()
            if self.device == "cuda":
                torch.cuda.synchronize()

        return step

    def train_flops(self) -> int:
        """Of a step: three times the forward's, by torch's counter on the meta device."""
        with torch.device("meta"):
            net = UNet(**self.config)
            inputs = (torch.empty_like(v, device="meta")[:1] for v in (self.x, self.time, self.context))
            x, time_, context = inputs
        with FlopCounterMode(display=False) as counter:
            net(x, time_, {"context": context})
        return 3 * self.batch * counter.get_total_flops()


@contextmanager
def same_weights(bench: Bench) -> Iterator[Path]:
    """A file with weights that every contestant starts from."""
    torch.manual_seed(0)
    with tempfile.TemporaryDirectory() as folder:
        state = {name: value.contiguous() for name, value in UNet(**bench.config).state_dict().items()}
        save_file(state, Path(folder) / "weights.safetensors")
        yield Path(folder) / "weights.safetensors"


def main() -> None:
    """Prints medians, ratios, shares of the peak and memory."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--precision", choices=("bf16", "fp32"), default="bf16")
    parser.add_argument("--model", choices=tuple(MODELS), default="small")
    parser.add_argument("--size", type=int, default=32)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--compiled", action="store_true")
    parser.add_argument("--denormals", action="store_true", help="ours beside itself with denormals kept")
    parser.add_argument("--alone", nargs=2, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    bench = Bench(arguments)
    if arguments.alone is not None:
        return serve(bench.contestant(*arguments.alone))
    print(f"{machine()}, {' '.join(sys.argv[1:]) or 'defaults'}")
    names = ["sdtrain", "diffusers, tuned", "diffusers, as shipped"]
    if arguments.compiled:
        names = ["sdtrain, compiled by region", "diffusers, tuned, compiled whole"]
    if arguments.denormals:
        names = ["sdtrain", "sdtrain, denormals kept"]
    with same_weights(bench) as weights:
        steps = {name: Contestant([*sys.argv, "--alone", name, str(weights)]) for name in names}
        for name, step in steps.items():
            start = time.perf_counter()
            step()
            if arguments.compiled:
                print(f"  {name:44s} {time.perf_counter() - start:9.1f} s to the end of the first step")
    medians = compare(steps, rounds=arguments.rounds)
    flops, peak = bench.train_flops(), matmul_peak(torch.bfloat16 if bench.is_bf16 else torch.float32)
    for name, seconds in medians.items():
        print(
            f"  {name:44s} {bench.batch / seconds:7.2f} images/s, {flops / seconds / peak:6.1%} of "
            f"{peak / 1e12:.2f} TFLOP/s, peak memory {steps[name].end():.2f} GiB"
        )
    return None


if __name__ == "__main__":
    main()
