"""GroupNorm with SiLU, and GEGLU, each in one pass over memory on a CPU: `kernels.c`, built at first use.

torch takes a kernel for each step and float32 between them (`tools/bench/kernels.py` times both). A C compiler is
looked for once; without one torch's own operations do the same, as they do on every other device, under
`torch.compile` and in other precisions.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

_SOURCES = sorted(Path(__file__).parent.glob("*.c"))
_FLAGS = "-std=gnu11 -O3 -march=native -fno-math-errno -fno-trapping-math -fopenmp -fPIC -shared".split()
_WIDE = "-mprefer-vector-width=512"  # of x86; gcc halves vectors otherwise
_DTYPES = {torch.float32: "f32", torch.bfloat16: "bf16"}


@cache
def library() -> ctypes.CDLL | None:
    """The built kernels, those of `flash_*.c` as well, or None where there is no C compiler that makes them.

    What was built is kept in the user's cache under the hash of source, compiler and processor; several processes may
    build at once.
    """
    compiler = shutil.which("gcc") or shutil.which("cc")
    if compiler is None:
        return None
    flags = [*_FLAGS, *([_WIDE] if platform.machine() == "x86_64" else [])]
    try:
        version = subprocess.run([compiler, "--version"], capture_output=True, check=True).stdout
        read = b"".join(source.read_bytes() for source in _SOURCES)
        key = hashlib.sha256(read + version + " ".join(flags).encode() + _processor()).hexdigest()
        folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "sdtrain"
        built = folder / f"kernels-{key[:16]}.so"
        if not built.exists():
            folder.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryDirectory(dir=folder) as scratch:
                made = Path(scratch) / "kernels.so"
                subprocess.run([compiler, *flags, "-o", made, *_SOURCES, "-lm"], capture_output=True, check=True)
                made.replace(built)
        return ctypes.CDLL(str(built))
    except (OSError, subprocess.SubprocessError):  # no OpenMP, a home that cannot be written: torch's way it is
        return None


def _processor() -> bytes:
    """What `-march=native` looks at: nodes of one cluster share the cache, not always the processor."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor().encode()
    return "\n".join(sorted({line for line in lines if line.startswith(("model name", "flags", "Features"))})).encode()


def group_norm(x: Tensor, num_groups: int, weight: Tensor, bias: Tensor, eps: float, silu: bool) -> Tensor:
    """Group normalisation (Wu and He 2018), then SiLU if wanted: (B, C, H, W) -> the same, channels-last.

    Statistics are float32 of two passes. The answer has autocast's dtype where autocast is on.
    """
    if _is_ours(x, weight, bias):
        return _GroupNorm.apply(x, num_groups, weight, bias, eps, silu)
    if x.device.type == "cpu":
        x = x.to(weight.dtype)  # float32: 1.2 times as fast as torch's bfloat16 channels-last kernel
        if weight.requires_grad and not x.requires_grad:
            x = x.detach().requires_grad_()  # torch 2.13 segfaults in its backward without a gradient for x
    y = F.group_norm(x, num_groups, weight, bias, eps).contiguous(memory_format=torch.channels_last)
    return F.silu(y) if silu else y


def geglu(x: Tensor) -> Tensor:
    """(..., 2 D) -> (..., D): the first half times GELU of the second (Shazeer 2020)."""
    if _is_ours(x):
        return _GEGLU.apply(x)
    value, gate = x.chunk(2, dim=-1)
    return value * F.gelu(gate)


def _is_ours(x: Tensor, *parameters: Tensor) -> bool:
    return (
        x.device.type == "cpu"
        and not torch.compiler.is_compiling()
        and all(p.dtype == torch.float32 for p in parameters)
        and (x.dtype, _answer(x)) in {(torch.float32, torch.float32), *((d, torch.bfloat16) for d in _DTYPES)}
        and x.numel() > 0
        and library() is not None
    )


def _answer(x: Tensor) -> torch.dtype:
    return torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else x.dtype


def _call(name: str, x: Tensor, y: Tensor, *arguments: Tensor | float) -> None:
    """Tensors go as addresses, whole numbers as int64, others as float; the last two of the kernels are int."""
    given = [
        ctypes.c_void_p(a.data_ptr()) if isinstance(a, Tensor) else ctypes.c_float(a) if isinstance(a, float) else a
        for a in arguments
    ]
    getattr(library(), f"{name}_{_DTYPES[x.dtype]}_{_DTYPES[y.dtype]}")(*given, torch.get_num_threads())


class _GroupNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, groups: int, weight: Tensor, bias: Tensor, eps: float, silu: bool) -> Tensor:  # noqa: ANN401
        x, weight, bias = x.contiguous(memory_format=torch.channels_last), weight.contiguous(), bias.contiguous()
        y = torch.empty_like(x, dtype=_answer(x))
        mean, rstd = (torch.empty(x.shape[0], groups) for _ in range(2))
        _call("group_norm", x, y, x, weight, bias, y, mean, rstd, *_sizes(x, groups), eps, silu)
        ctx.save_for_backward(x, weight, bias, mean, rstd)
        ctx.silu = silu
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:  # noqa: ANN401
        x, weight, bias, mean, rstd = ctx.saved_tensors
        dy = dy.contiguous(memory_format=torch.channels_last)
        dx = torch.empty_like(x)
        dweight, dbias = (torch.empty(x.shape[:2]) for _ in range(2))
        sizes = _sizes(x, mean.shape[1])
        _call("group_norm_backward", x, dy, dy, x, weight, bias, mean, rstd, dx, dweight, dbias, *sizes, ctx.silu)
        return dx, None, dweight.sum(0), dbias.sum(0), None, None


def _sizes(x: Tensor, groups: int) -> tuple[ctypes.c_int64, ...]:
    return tuple(map(ctypes.c_int64, (x.shape[0], x.shape[2] * x.shape[3], x.shape[1], groups)))


class _GEGLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:  # noqa: ANN401
        x = x.contiguous()
        y = torch.empty((*x.shape[:-1], x.shape[-1] // 2), dtype=_answer(x))
        _call("geglu", x, y, x, y, ctypes.c_int64(y.numel() // y.shape[-1]), ctypes.c_int64(y.shape[-1]))
        ctx.save_for_backward(x)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> Tensor:  # noqa: ANN401
        (x,) = ctx.saved_tensors
        dy, dx = dy.contiguous(), torch.empty_like(x)
        d = dy.shape[-1]
        _call("geglu_backward", x, dy, dy, x, dx, ctypes.c_int64(dy.numel() // d), ctypes.c_int64(d))
        return dx
