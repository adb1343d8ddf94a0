"""Stage 2's objective: predict what was mixed with noise. One class; path, prediction, times and weights come from
YAML.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from sdtrain.contracts import Conditioning, Denoiser, NoisePath, PathPoint
from sdtrain.diffusion import prediction as predictions
from sdtrain.diffusion import variance as variances
from sdtrain.diffusion.path import VariancePreserving
from sdtrain.diffusion.prediction import Prediction, spread
from sdtrain.errors import ConfigError
from sdtrain.ops.random import Draw

_BOUND_WEIGHT = 1e-3  # lambda of Nichol and Dhariwal 2021, equation 16


class Denoising:
    """Denoising score matching in any of its parametrisations (Ho et al. 2020; Salimans and Ho 2022; Lipman et al.
    2022).

    loss = w(t) |network(x_t, t) - target|^2, the mean over elements, per sample.

    Args:
        path: x_t = alpha x0 + sigma noise.
        prediction: what the network's output means: epsilon, x0, v or velocity.
        timestep: the density that t is drawn from.
        weighting: w(t), relative to the prediction's own squared error.
        learned_variance: the network's output has twice the channels, and its second half says the variance of a
            reverse step (Nichol and Dhariwal 2021); the hybrid loss of equation 16.
        offset_noise: the standard deviation of a constant that each channel of the noise is moved by (Guttenberg 2023).
        input_perturbation: the standard deviation of noise in the input that is not in the target (Ning et al. 2023).

    Raises:
        ConfigError: for a prediction that does not determine x0 on the whole path, or a variance on a path without
            steps.
    """

    def __init__(
        self,
        path: NoisePath,
        prediction: Prediction,
        timestep: Callable[[Draw, NoisePath], Tensor],
        weighting: Callable[[Prediction, PathPoint], Tensor],
        learned_variance: bool = False,
        offset_noise: float = 0.0,
        input_perturbation: float = 0.0,
    ) -> None:
        predictions.check(prediction, path)
        if learned_variance and not isinstance(path, VariancePreserving):
            raise ConfigError(
                f"objective.learned_variance needs a VariancePreserving path; {type(path).__name__} has no steps"
            )
        self.path, self.prediction, self.timestep, self.weighting = path, prediction, timestep, weighting
        self.learned_variance, self.offset_noise = learned_variance, offset_noise
        self.input_perturbation = input_perturbation

    def loss(self, denoiser: Denoiser, x0: Tensor, cond: Conditioning, draw: Draw) -> dict[str, Tensor]:
        """x0 (B, C, h, w) -> {"loss": (B,), "t": (B,), "output": (B, C or 2C, h, w), "x_t": (B, C, h, w)}."""
        t = self.timestep(draw, self.path)
        shape = x0.shape[1:]
        noise = draw.normal("noise", shape)
        if self.offset_noise:
            noise = noise + self.offset_noise * draw.normal("offset_noise", (shape[0], 1, 1))
        mixed = noise
        if self.input_perturbation:
            mixed = noise + self.input_perturbation * draw.normal("input_perturbation", shape)
        point = self.path(t)
        at = PathPoint(*(spread(v, x0) for v in point))
        x_t = at.alpha * x0 + at.sigma * mixed
        output = self._ask(denoiser, x_t, t, cond)
        error = output[:, : shape[0]] - predictions.target(self.prediction, x0, noise, at)
        loss = self.weighting(self.prediction, point) * error.square().flatten(1).mean(dim=1)
        if self.learned_variance:
            predicted, fraction = self.to_x0(output, x_t, t).detach(), variances.fraction_of(output[:, shape[0] :])
            loss = loss + _BOUND_WEIGHT * variances.variational_bound(self.path, t, x0, predicted, fraction)
        return {"loss": loss, "t": t, "output": output, "x_t": x_t}

    def x0_error(self, denoiser: Denoiser, x0: Tensor, noise: Tensor, cond: Conditioning, ratio: Tensor) -> Tensor:
        """The mean over elements of |predicted x0 - x0|^2 at x_t = alpha x0 + sigma noise, (B,): what every
        parametrisation is compared by, since x_t says the same of x0 on every path.

        Args:
            ratio: (B,) sigma / alpha, which is exp(-log-SNR / 2); one beyond the path's ends is taken at the nearest.
        """
        t = self.path.time_of(ratio)
        at = PathPoint(*(spread(v, x0) for v in self.path(t)))
        x_t = at.alpha * x0 + at.sigma * noise
        found = self.to_x0(self._ask(denoiser, x_t, t, cond), x_t, t)
        return (found - x0).square().flatten(1).mean(dim=1)

    def _ask(self, denoiser: Denoiser, x_t: Tensor, t: Tensor, cond: Conditioning) -> Tensor:
        """The network's output at x_t, float32."""
        scaled = x_t * spread(self.path.input_scale(t), x_t)
        output = denoiser(scaled, self.path.network_time(t), cond).float()
        num_wanted = x_t.shape[1] * (2 if self.learned_variance else 1)
        if output.shape[1] != num_wanted:
            raise ConfigError(
                f"model.out_channels={output.shape[1]} must be {num_wanted}: the latent's {x_t.shape[1]} channels, and"
                " as many again with objective.learned_variance=true"
            )
        return output

    def to_x0(self, prediction: Tensor, x_t: Tensor, t: Tensor) -> Tensor:
        """The x0 that the network's output at x_t means; t (B,). What is said of the variance is left out."""
        at = PathPoint(*(spread(v, x_t) for v in self.path(t)))
        return predictions.to_x0(self.prediction, prediction[:, : x_t.shape[1]], x_t, at)

    def x0_of(self, denoiser: Denoiser, variance: bool = False) -> Callable[[Tensor, float, Conditioning], Tensor]:
        """The function that samplers and guidance call: (x_t, t, conditioning) -> x0 (B, C, h, w).

        Args:
            variance: -> (B, 2C, h, w), x0 and the fraction of `variance.log_variance`, 0 for beta-tilde and 1 for beta.

        Raises:
            ConfigError: for a variance that was not learned.
        """
        if variance and not self.learned_variance:
            raise ConfigError("sampler.variance=learned needs a run with objective.learned_variance=true")

        def x0(x: Tensor, t: float, cond: Conditioning) -> Tensor:
            times = torch.full((x.shape[0],), t, device=x.device)
            output = self._ask(denoiser, x, times, cond)
            found = self.to_x0(output, x, times)
            if not variance:
                return found
            return torch.cat((found, variances.fraction_of(output[:, x.shape[1] :])), dim=1)

        return x0
