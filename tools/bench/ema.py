"""One update of the moving average beside those of others, in one process, A B A B, on one shape list and layout.

    python tools/bench/ema.py [--width 40] [--rounds 30]

The shapes are those of Stable Diffusion 2's U-Net (686 tensors) at an eighth of its width, or at the width given (320
is the whole). Peers: CompVis' LitEma, written here as it is documented (a loop over named parameters, each with a
buffer under its name without dots, `buffer.sub_(one_minus_decay * (buffer - parameter))`); torch's `swa_utils` with
its foreach average; diffusers' `EMAModel` in its default form and with `foreach`. The last line is a copy of as many
bytes as the update reads and writes.

The limit is memory: an average reads 4 bytes of a weight and 4 of its average, and writes 4: 12 a parameter, and 8 more
for a second length. LitEma's three operations move 12, 8 and 12, 32 together, so one pass is at most 32 / 12 = 2.7
times as fast where neither fits a cache. Measured at 13.6 M parameters on one core of a Xeon (2 MB of L2): LitEma 21.1
ms, ours 10.8 ms, 15 GB/s, 1.96x; a loop of C over one flat buffer 7.5 ms, 22 GB/s, 2.8x, and over the tensors as they
lie 8.9 ms. Five times would be 39 GB/s, which this core does not have.
"""

from __future__ import annotations

import argparse
import sys

import torch
from diffusers.training_utils import EMAModel
from timing import compare, machine
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from sdtrain.model.unet import UNet
from sdtrain.optim.averaging import Exponential, Power
from sdtrain.optim.ema import EMA

DECAY = 0.9999


class LoopEma(nn.Module):
    """The average of CompVis' repositories."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.register_buffer("decay", torch.tensor(DECAY))
        self.register_buffer("num_updates", torch.tensor(0))
        self.buffer_of = {}
        for name, p in model.named_parameters():
            self.buffer_of[name] = name.replace(".", "")
            self.register_buffer(self.buffer_of[name], p.detach().clone())

    @torch.no_grad()
    def forward(self, model: nn.Module) -> None:
        """One update, with the decay warmed up by the count of updates."""
        self.num_updates += 1
        decay = min(self.decay, (1 + self.num_updates) / (10 + self.num_updates))
        one_minus_decay = 1.0 - decay
        parameters, buffers = dict(model.named_parameters()), dict(self.named_buffers())
        for name, p in parameters.items():
            if p.requires_grad:
                buffer = buffers[self.buffer_of[name]]
                buffer.sub_(one_minus_decay * (buffer - p))


def unet(width: int) -> nn.Module:
    """Stable Diffusion 2's U-Net at a width, channels-last as it is trained."""
    widths = (width, 2 * width, 4 * width, 4 * width)
    net = UNet(
        block_out_channels=widths,
        norm_num_groups=8,
        cross_attention_dim=1024 * width // 320,
        attention_head_dim=(5, 10, 20, 20),
        use_linear_projection=True,
    )
    return net.to(memory_format=torch.channels_last)


def main() -> None:
    """Prints medians and ratios."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--width", type=int, default=40)
    parser.add_argument("--rounds", type=int, default=30)
    arguments = parser.parse_args()
    net = unet(arguments.width)
    net.to("cuda" if torch.cuda.is_available() else "cpu")
    parameters = list(net.parameters())
    num = sum(p.numel() for p in parameters)
    print(f"{machine()}, {' '.join(sys.argv[1:]) or 'defaults'}: {len(parameters)} tensors, {num / 1e6:.1f} M")
    ours, two = (
        EMA(net.named_parameters(), [Exponential(DECAY)]),
        EMA(net.named_parameters(), [Power(0.05), Power(0.1)]),
    )
    loop, averaged = LoopEma(net), AveragedModel(net, multi_avg_fn=get_ema_multi_avg_fn(DECAY))
    theirs = {
        f"diffusers{', foreach' * foreach}": EMAModel(net.parameters(), decay=DECAY, foreach=foreach)
        for foreach in (True, False)
    }
    source, target = torch.zeros(2, 3 * num // 2, device=parameters[0].device)  # an update reads two and writes one

    def waited(function):  # noqa: ANN001, ANN202
        def call() -> None:
            function()
            if torch.cuda.is_available():
                torch.cuda.synchronize()

        return call

    medians = compare(
        {
            "sdtrain": waited(ours.update),
            "sdtrain, two lengths": waited(two.update),
            "torch swa_utils, foreach": waited(lambda: averaged.update_parameters(net)),
            **{name: waited(lambda average=average: average.step(parameters)) for name, average in theirs.items()},
            "a copy of as many bytes": waited(lambda: target.copy_(source)),
            "LitEma": waited(lambda: loop(net)),
        },
        rounds=arguments.rounds,
    )
    peers = [seconds for name, seconds in medians.items() if "torch" in name or "diffusers" in name]
    print(f"  {min(peers) / medians['sdtrain']:.2f}x of the speed of the fastest peer, ", end="")
    print(f"{medians['a copy of as many bytes'] / medians['sdtrain']:.0%} of that of a copy")


if __name__ == "__main__":
    main()
