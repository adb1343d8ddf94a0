"""Where a sampler asks the denoiser: times on the path, and the levels of signal and noise there.

A value of YAML names the spacing (Lin et al. 2024, table 2, has the first four):
    uniform       1, 1 - 1/N, ..., 1/N
    linspace      N times with both ends; on a path whose sigma(0) is 0 the last is step 1 of 1000, shifted
    leading       every (T // N)th step from step 1 up: the last noise levels, and never quite the first
    trailing      every (T / N)th step from the last one down; zero-terminal SNR wants this or `uniform`
    leading_open  `leading` of N + 1 steps without its least: what diffusers' DPM-Solver and UniPC call leading
    karras        equal steps in (sigma / alpha)^(1/7) (Karras et al. 2022, equation 5)
leading and trailing count the path's own steps, T = 1000 where it has none. Every spacing is then shifted,
t' = s t / (1 + (s - 1) t) (Esser et al. 2024, equation 23): s > 1 puts more of the times near the noise.
"""

from __future__ import annotations

import math
from typing import Literal, NamedTuple, get_args

import torch
from torch import Tensor

from sdtrain.contracts import NoisePath
from sdtrain.errors import ConfigError

Spacing = Literal["uniform", "linspace", "leading", "trailing", "leading_open", "karras"]
RHO = 7
SIGMA_MIN, SIGMA_MAX = 0.002, 80.0  # of sigma / alpha, where a path has no bounds of its own (Karras et al. 2022)


class Level(NamedTuple):
    """x = alpha x0 + sigma noise at t."""

    t: float
    alpha: float
    sigma: float


def check(num_steps: int, spacing: str, shift: float) -> None:
    """Refuses values that no path could take.

    Raises:
        ConfigError: naming the value.
    """
    if num_steps < 1:
        raise ConfigError(f"sampler.num_steps={num_steps} must be at least 1")
    if spacing not in get_args(Spacing):
        raise ConfigError(f"sampler.spacing={spacing} is none of {', '.join(get_args(Spacing))}")
    if not shift > 0:
        raise ConfigError(f"sampler.shift={shift} must be above 0")


def levels(path: NoisePath, num_steps: int, spacing: Spacing, shift: float) -> list[Level]:
    """The `num_steps` levels to ask at, and the data itself (alpha 1, sigma 0), where the last step ends.

    Raises:
        ConfigError: where the path has fewer steps than are wanted, or the shift leaves no time between them.
    """
    if spacing == "karras":
        times = _karras(path, num_steps)
    elif spacing in ("uniform", "linspace"):
        times = _continuous(path, num_steps, spacing, shift)
    else:
        times = _discrete(path, num_steps, spacing)
    times = _shifted(times, shift)
    if not bool((times.diff() < 0).all()):
        raise ConfigError(f"sampler.shift={shift} with num_steps={num_steps}: no two of the times may be the same")
    at = path(times)
    return [*map(Level, times.tolist(), at.alpha.tolist(), at.sigma.tolist()), Level(0.0, 1.0, 0.0)]


def start(noise: Tensor, first: Level) -> Tensor:
    """x at the first level: noise with the spread of noised data of variance 1."""
    return noise * math.hypot(first.alpha, first.sigma)


def _shifted(times: Tensor, shift: float) -> Tensor:
    return shift * times / (1 + (shift - 1) * times)


def _continuous(path: NoisePath, num_steps: int, spacing: Spacing, shift: float) -> Tensor:
    if spacing == "uniform":
        return 1 - torch.arange(num_steps, dtype=torch.float64) / num_steps
    zero = torch.zeros(1, dtype=torch.float64)
    # diffusers shifts this end twice, once here and once with the rest; pictures of its SD3 pipeline are made so.
    end = zero if path(zero).sigma > 0 else _shifted(zero + 1e-3, shift)
    return torch.linspace(1, float(end), num_steps, dtype=torch.float64)


def _discrete(path: NoisePath, num_steps: int, spacing: Spacing) -> Tensor:
    own = getattr(path, "num_steps", None)
    total = own or 1000
    num = num_steps + (spacing == "leading_open")
    if num > total:
        raise ConfigError(f"sampler.num_steps={num_steps} with spacing={spacing} is more than the path's {total} steps")
    if spacing == "trailing":
        steps = torch.round(total - torch.arange(num, dtype=torch.float64) * total / num) - 1
    else:
        steps = torch.arange(num, dtype=torch.float64).flip(0) * (total // num) + (num < total)
    steps = steps[:num_steps]
    return steps / (total - 1) if own else (steps + 1) / total


def _karras(path: NoisePath, num_steps: int) -> Tensor:
    ends = path(torch.tensor([0.0, 1.0], dtype=torch.float64))
    least, most = (ends.sigma / ends.alpha).tolist()  # infinite where alpha is 0
    low, high = max(least, SIGMA_MIN) ** (1 / RHO), min(most, SIGMA_MAX) ** (1 / RHO)
    times = path.time_of(torch.linspace(high, low, num_steps, dtype=torch.float64) ** RHO)
    times[0] = 1.0  # the noise that sampling starts from is that of t = 1
    return times
