"""DDIM (Song et al. 2021a)."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from sdtrain.contracts import NoisePath
from sdtrain.errors import ConfigError
from sdtrain.ops.random import Draw


class DDIM:
    """x_s = alpha_s x0 + sqrt(sigma_s^2 - w^2) noise + w z (equation 12), from t = 1 to 0 in equal steps.

    Args:
        num_steps: evaluations of the denoiser.
        eta: 0 is deterministic, 1 as random as DDPM; w = eta sigma_s / sigma_t sqrt(sigma_t^2 - (alpha_t sigma_s /
            alpha_s)^2), which is equation 16 where alpha^2 + sigma^2 = 1.
        guidance_scale: of classifier-free guidance, unless the caller says another.
    """

    def __init__(self, num_steps: int = 50, eta: float = 0.0, guidance_scale: float = 1.0) -> None:
        if num_steps < 1:
            raise ConfigError(f"sampler.num_steps={num_steps} must be at least 1")
        self.num_steps, self.eta, self.guidance_scale = num_steps, eta, guidance_scale

    def __call__(
        self, denoise: Callable[[Tensor, float], Tensor], noise: Tensor, path: NoisePath, draw: Draw | None = None
    ) -> Tensor:
        """noise (B, C, h, w) -> x0.

        Raises:
            ValueError: for eta > 0 without a draw.
        """
        if self.eta > 0 and draw is None:
            raise ValueError("DDIM with eta > 0 needs a draw for the noise of its steps")
        times = torch.linspace(1.0, 0.0, self.num_steps + 1)
        points = path(times)
        x = noise
        for i in range(self.num_steps):
            x0 = denoise(x, float(times[i]))
            (a, s), (a_next, s_next) = ((points.alpha[k], points.sigma[k]) for k in (i, i + 1))
            if i == self.num_steps - 1:
                return x0
            w = self.eta * s_next / s * (s**2 - (a * s_next / a_next) ** 2).clamp(min=0).sqrt()
            x = a_next * x0 + (s_next**2 - w**2).clamp(min=0).sqrt() * (x - a * x0) / s
            if self.eta > 0:
                x = x + w * draw.normal(f"ddim.{i}", x.shape[1:])
        return x
