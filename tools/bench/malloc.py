"""A training step with glibc's allocator as it is and as `ops/memory.py` tells it to be, in processes in turn.

python tools/bench/malloc.py
"""

from __future__ import annotations

import statistics
import subprocess
import sys

_STEP = """
import time, torch
from sdtrain.model.unet import UNet
from sdtrain.ops.memory import keep_freed_memory
if {kept}: keep_freed_memory()
unet = UNet(in_channels=4, out_channels=4, block_out_channels=(64, 192), layers_per_block=1, cross_attention_dim=192,
    down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"), up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
    attention_head_dim=(2, 6), use_linear_projection=True, norm_num_groups=16)
x, t, c = torch.randn(64, 4, 16, 16), torch.rand(64), torch.randn(64, 24, 192)
found = []
for _ in range(8):
    start = time.perf_counter()
    with torch.autocast("cpu", torch.bfloat16):
        y = unet(x, t, {{"context": c}})
    y.float().square().mean().backward()
    found.append(time.perf_counter() - start)
print(sorted(found[2:])[3])
"""


def main() -> None:
    """Medians of three processes each."""
    found: dict[bool, list[float]] = {True: [], False: []}
    for _ in range(3):
        for kept in (True, False):
            result = subprocess.run(
                [sys.executable, "-c", _STEP.format(kept=kept)], capture_output=True, text=True, check=True
            )
            found[kept].append(float(result.stdout))
    kept, plain = (statistics.median(found[k]) for k in (True, False))
    print(f"kept {kept * 1e3:.0f} ms, as it is {plain * 1e3:.0f} ms: {plain / kept:.2f}x")


if __name__ == "__main__":
    main()
