"""A tiny denoiser, and schedulers of diffusers led through it, to lay beside our samplers step by step."""

import sys

import pytest
import torch

from sdtrain.diffusion.path import RectifiedFlow, VariancePreserving
from sdtrain.ops.random import Draw

MEAN, STD = 0.3, 0.5


def model(x, t, alpha, sigma):
    """x0: that of a Gaussian, bent, and bent another way at every t."""
    gain = alpha * STD**2 / (alpha**2 * STD**2 + sigma**2)
    return MEAN + gain * (x - alpha * MEAN) + 0.1 * torch.sin(2 * x + 5 * t)


class Beside:
    """What the network is shown at every evaluation, and what comes out, by a sampler and by a scheduler.

    Both start from the same noise, and the scheduler's random numbers are the sampler's.
    """

    def __init__(self, monkeypatch):
        self.monkeypatch, self.draw = monkeypatch, Draw.of(0, 2)
        self.noise = self.draw.normal("generation", (3, 8, 8))

    def ours(self, sampler, path, v=None):
        seen, times = [], []

        def denoise(x, t):
            seen.append(x)
            times.append(t)
            at = path(torch.tensor(t, dtype=torch.float64))
            x0 = model(x, t, float(at.alpha), float(at.sigma))
            return x0 if v is None else torch.cat((x0, v(x)), dim=1)

        end = sampler(denoise, self.noise, path, self.draw)
        return [*seen, end], times

    def theirs(self, scheduler, prediction, times, v=None, purpose=None, **options):
        """`times` are what the model is told; alpha and sigma are the scheduler's own."""
        if purpose:
            module = sys.modules[type(scheduler).__module__]
            drawn = lambda *args, **kwargs: self.draw.normal(f"{purpose}.{i}", self.noise.shape[1:])  # noqa: E731
            self.monkeypatch.setattr(module, "randn_tensor", drawn)
        x, seen = self.noise, []
        for i, (step, t) in enumerate(zip(scheduler.timesteps, times, strict=True)):
            a, s = self.level(scheduler, prediction, i, step)
            if i == 0 and getattr(scheduler, "init_noise_sigma", 1.0) != 1.0:
                x = x / a  # k-diffusion's x is x / alpha
            seen.append(x if prediction == "flow" else scheduler.scale_model_input(x, step))
            x0 = model(seen[-1], t, a, s)
            n = (seen[-1] - a * x0) / s
            output = {"epsilon": n, "v_prediction": a * n - s * x0, "sample": x0, "flow": n - x0}[prediction]
            if v is not None:
                output = torch.cat((output, 2 * v(seen[-1]) - 1), dim=1)
            x = scheduler.step(output, step, x, **options).prev_sample
        return [*seen, x]

    @staticmethod
    def level(scheduler, prediction, i, step):
        if prediction == "flow":
            sigma = float(scheduler.sigmas[i])
            return 1 - sigma, sigma
        if hasattr(scheduler, "sigmas"):
            ratio = float(scheduler.sigmas[i])
            return (1 + ratio**2) ** -0.5, ratio * (1 + ratio**2) ** -0.5
        bar = float(scheduler.alphas_cumprod[step])
        return bar**0.5, (1 - bar) ** 0.5

    def check(self, sampler, scheduler, prediction="epsilon", path=None, v=None, last=None, **options):
        """Within 1e-4 up to the evaluation `last`; the times too, which some of diffusers' schedulers round."""
        is_flow = prediction == "flow"
        path = path or (RectifiedFlow() if is_flow else VariancePreserving())
        scheduler.set_timesteps(sampler.num_steps)
        ours, times = self.ours(sampler, path, v)
        told = [t * (1000 if is_flow else 999) for t in times]
        assert told == pytest.approx(scheduler.timesteps.tolist(), abs=0.51)
        theirs = self.theirs(scheduler, prediction, times, v, **options)
        assert len(ours) == len(theirs) == len(times) + 1
        for i, (own, other) in enumerate(zip(ours[:last], theirs[:last])):
            torch.testing.assert_close(own, other, rtol=1e-4, atol=1e-4, msg=lambda m, i=i: f"evaluation {i}: {m}")


@pytest.fixture
def beside(monkeypatch):
    return Beside(monkeypatch)


@pytest.fixture
def scaled_linear():
    """Stable Diffusion's schedule, as diffusers spells it."""
    return {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}
