"""A reverse step's learned variance against diffusers' DDPM and torch's divergence."""

import math

import pytest
import torch
from diffusers import DDPMScheduler
from torch.distributions import Normal, kl_divergence

from sdtrain.contracts import PathPoint
from sdtrain.diffusion.path import VariancePreserving
from sdtrain.diffusion.variance import fraction_of, log_variance, reverse_step, training_step, variational_bound

PATHS = [VariancePreserving(), VariancePreserving("cosine"), VariancePreserving(zero_terminal_snr=True)]
STEPS = torch.arange(1000, dtype=torch.float64)


def test_the_schedules_steps_are_those_of_ddpm():
    scheduler = DDPMScheduler(1000, 0.00085, 0.012, "scaled_linear", variance_type="learned_range", clip_sample=False)
    step = training_step(VariancePreserving(), STEPS / 999)
    torch.testing.assert_close(step.beta.float(), scheduler.betas, rtol=2e-4, atol=0)
    bar = scheduler.alphas_cumprod.double()
    of_x0 = torch.cat((torch.ones(1), bar[:-1].sqrt() * scheduler.betas[1:] / (1 - bar[1:])))
    torch.testing.assert_close(step.of_x0, of_x0.double(), rtol=5e-4, atol=0)
    output = torch.linspace(-1.2, 1.2, 1000)
    wanted = torch.stack([scheduler._get_variance(i, output[i]) for i in range(1, 1000)])
    found = log_variance(fraction_of(output), step)[1:]
    torch.testing.assert_close(found.float(), wanted, rtol=2e-4, atol=2e-3)
    assert float(step.beta_tilde[0]) == float(step.beta_tilde[1])


@pytest.mark.parametrize("path", PATHS, ids=str)
def test_a_step_of_any_length_is_the_gaussian_that_bayes_rule_gives(path):
    late, early = (path(torch.tensor(t, dtype=torch.float64)) for t in (0.83, 0.31))
    step = reverse_step(late, early)
    x0, x_t = 0.7, -0.4
    ratio = late.alpha / early.alpha  # x_t = ratio x_s + sqrt(beta) noise, and x_s is normal around x0
    precision = 1 / early.sigma**2 + ratio**2 / step.beta
    mean = (early.alpha * x0 / early.sigma**2 + ratio * x_t / step.beta) / precision
    torch.testing.assert_close(step.beta_tilde, 1 / precision)
    of_x_t = ratio * early.sigma**2 / late.sigma**2
    torch.testing.assert_close(step.of_x0 * x0 + of_x_t * x_t, mean)


@pytest.mark.parametrize("path", PATHS, ids=str)
def test_float32_steps_are_accurate(path):
    single, double = training_step(path, (STEPS / 999).float()), training_step(path, STEPS / 999)
    for name in single._fields:
        found = getattr(single, name)
        assert found.dtype == torch.float32
        torch.testing.assert_close(found.double(), getattr(double, name), rtol=1e-3, atol=0)


@pytest.mark.parametrize("path", PATHS, ids=str)
def test_the_bound_is_the_divergence_of_two_gaussians(path):
    generator = torch.Generator().manual_seed(0)
    t = torch.cat((torch.rand(30, generator=generator), torch.tensor([0.0, 1 / 999, 0.5 / 999, 1.0]))).double()
    x0, predicted, output = torch.randn(3, len(t), 2, 3, 3, generator=generator, dtype=torch.float64)
    step = training_step(path, t)
    step = type(step)(*(value.view(-1, 1, 1, 1) for value in step))
    fraction = fraction_of(output)
    spread_of_p = (step.beta.log() * fraction + step.beta_tilde.log() * (1 - fraction)).exp().sqrt()
    q, p = Normal(step.of_x0 * x0, step.beta_tilde.sqrt()), Normal(step.of_x0 * predicted, spread_of_p)
    expected = 1000 * kl_divergence(q, p).mean((1, 2, 3)) / math.log(2)
    torch.testing.assert_close(variational_bound(path, t, x0, predicted, fraction), expected)


@pytest.mark.parametrize("path", PATHS, ids=str)
def test_the_bound_is_finite_at_every_step_and_zero_where_nothing_is_wrong(path):
    t = torch.cat((torch.linspace(0, 1, 1000), torch.linspace(0, 3 / 999, 50)))
    x0 = torch.randn(len(t), 1, 2, 2, generator=torch.Generator().manual_seed(0))
    assert float(variational_bound(path, t, x0, x0, torch.zeros_like(x0)).abs().max()) < 1e-9
    for fraction in (0.0, 0.5, 1.0):
        found = variational_bound(path, t, x0, x0 + 0.1, torch.full_like(x0, fraction))
        assert bool(found.isfinite().all())
        assert bool((found >= 0).all())


def test_values_broadcast_over_pictures():
    at, before = PathPoint(*(torch.tensor([0.8]),) * 4), PathPoint(*(torch.tensor([0.9]),) * 4)
    step = reverse_step(at, before)
    assert log_variance(torch.zeros(3, 4, 2, 2), step).shape == (3, 4, 2, 2)
