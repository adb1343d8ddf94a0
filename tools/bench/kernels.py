"""GroupNorm with SiLU, and GEGLU, forward and backward, on channels-last bfloat16 maps on a CPU: ours in one pass
beside torch's own operations as they stood before (GroupNorm and SiLU in float32).

python tools/bench/kernels.py

The limit is what memory must move at least: the input and the output once each way, and twice more the input, which
the backward reads again; by the speed of a copy of the same map.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from timing import compare, machine
from torch import Tensor
from torch.nn import functional as F

from sdtrain.layer import kernels
from sdtrain.ops.memory import keep_freed_memory

_GROUPS, _EPS = 4, 1e-5


def group_norm_cases(shape: tuple[int, ...]) -> dict[str, Callable[[], object]]:
    """Of one shape."""
    x = torch.randn(shape).bfloat16().contiguous(memory_format=torch.channels_last).requires_grad_()
    weight, bias = (torch.randn(shape[1], requires_grad=True) for _ in range(2))
    direction = torch.randn(shape).bfloat16().contiguous(memory_format=torch.channels_last)

    def both(y: Tensor) -> None:
        torch.autograd.grad(y, (x, weight, bias), direction)

    return {
        "limit": lambda: [x.detach().clone(memory_format=torch.channels_last) for _ in range(3)],
        "ours": lambda: both(kernels.group_norm(x, _GROUPS, weight, bias, _EPS, silu=True)),
        "torch": lambda: both(F.silu(F.group_norm(x.float(), _GROUPS, weight, bias, _EPS)).bfloat16()),
    }


def geglu_cases(shape: tuple[int, ...]) -> dict[str, Callable[[], object]]:
    """Of one shape."""
    x = torch.randn(shape).bfloat16().requires_grad_()
    direction = torch.randn(*shape[:-1], shape[-1] // 2).bfloat16()

    def torchs() -> Tensor:
        value, gate = x.chunk(2, dim=-1)
        return value * F.gelu(gate)

    return {
        "limit": lambda: [x.detach().clone() for _ in range(2)],
        "ours": lambda: torch.autograd.grad(kernels.geglu(x), x, direction),
        "torch": lambda: torch.autograd.grad(torchs(), x, direction),
    }


def main() -> None:
    """The shapes of the quickstart's U-Net and autoencoder."""
    keep_freed_memory()  # as a run does
    print(machine())
    for shape in [(128, 64, 16, 16), (128, 192, 16, 16), (128, 128, 8, 8), (16, 32, 64, 64), (4, 320, 32, 32)]:
        print(f"GroupNorm + SiLU {shape}")
        compare(group_norm_cases(shape))
    shape = (128, 64, 1024)
    print(f"GEGLU {shape}")
    compare(geglu_cases(shape))


if __name__ == "__main__":
    main()
