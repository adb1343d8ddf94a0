"""Stage 2's objective: predict what was mixed with noise. One class; path, prediction, times and weights come from
YAML.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from sdtrain.contracts import Conditioning, Denoiser, NoisePath, PathPoint
from sdtrain.diffusion import prediction as predictions
from sdtrain.diffusion.prediction import Prediction, spread
from sdtrain.ops.random import Draw


class Denoising:
    """Denoising score matching in any of its parametrisations (Ho et al. 2020; Salimans and Ho 2022; Lipman et al.
    2022).

    loss = w(t) |network(x_t, t) - target|^2, the mean over elements, per sample.

    Args:
        path: x_t = alpha x0 + sigma noise.
        prediction: what the network's output means: epsilon, x0, v or velocity.
        timestep: the density that t is drawn from.
        weighting: w(t), relative to the prediction's own squared error.
    """

    def __init__(
        self,
        path: NoisePath,
        prediction: Prediction,
        timestep: Callable[[Draw], Tensor],
        weighting: Callable[[Prediction, PathPoint], Tensor],
    ) -> None:
        predictions.check(prediction)
        self.path, self.prediction, self.timestep, self.weighting = path, prediction, timestep, weighting

    def at(self, t: Tensor, like: Tensor) -> PathPoint:
        """The path at (B,) times, spread to broadcast against `like` (B, ...)."""
        return PathPoint(*(spread(v, like) for v in self.path(t)))

    def loss(self, denoiser: Denoiser, x0: Tensor, cond: Conditioning, draw: Draw) -> dict[str, Tensor]:
        """x0 (B, C, h, w) -> {"loss": (B,), "t": (B,), "x0": (B, C, h, w) the prediction's}."""
        t = self.timestep(draw)
        noise = draw.normal("noise", x0.shape[1:])
        at = self.at(t, x0)
        x_t = at.alpha * x0 + at.sigma * noise
        output = denoiser(x_t, self.path.network_time(t), cond).float()
        error = (output - predictions.target(self.prediction, x0, noise, at)).square().flatten(1).mean(dim=1)
        weight = self.weighting(self.prediction, self.path(t))
        return {"loss": weight * error, "t": t, "output": output, "x_t": x_t}

    def to_x0(self, prediction: Tensor, x_t: Tensor, t: Tensor) -> Tensor:
        """The x0 that the network's output at x_t means; t (B,)."""
        return predictions.to_x0(self.prediction, prediction, x_t, self.at(t, x_t))

    def x0_of(self, denoiser: Denoiser) -> Callable[[Tensor, float, Conditioning], Tensor]:
        """The function that samplers and guidance call: (x_t, t, conditioning) -> x0."""

        def x0(x: Tensor, t: float, cond: Conditioning) -> Tensor:
            times = torch.full((x.shape[0],), t, device=x.device)
            return self.to_x0(denoiser(x, self.path.network_time(times), cond).float(), x, times)

        return x0
