"""Noise paths: their derivatives, their ends, and the same schedules as diffusers'."""

import pytest
import torch
from diffusers import DDIMScheduler

from sdtrain.diffusion.path import RectifiedFlow, VariancePreserving
from sdtrain.errors import ConfigError

SCHEDULES = ("scaled_linear", "linear", "cosine")
DIFFUSERS = {"scaled_linear": "scaled_linear", "linear": "linear", "cosine": "squaredcos_cap_v2"}
PATHS = [RectifiedFlow(), *(VariancePreserving(schedule) for schedule in SCHEDULES)]


@pytest.mark.parametrize("path", PATHS, ids=str)
def test_derivatives_agree_with_finite_differences(path):
    t = (torch.arange(999, dtype=torch.float64) + 0.37) / 999  # between the steps of a schedule, where it is smooth
    h = 1e-7
    at, after, before = path(t), path(t + h), path(t - h)
    for name in ("alpha", "sigma"):
        expected = (getattr(after, name) - getattr(before, name)) / (2 * h)
        torch.testing.assert_close(getattr(at, f"d_{name}"), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_every_step_is_that_of_diffusers(schedule):
    scheduler = DDIMScheduler(1000, 0.00085, 0.012, DIFFUSERS[schedule])
    path = VariancePreserving(schedule)
    at = path(torch.arange(1000, dtype=torch.float64) / 999)
    torch.testing.assert_close(at.alpha.square().float(), scheduler.alphas_cumprod, rtol=2e-4, atol=0)
    single = path(torch.arange(1000) / 999)  # float32 times lie beside the step by a rounding, and may not miss it
    torch.testing.assert_close(single.alpha.double(), at.alpha, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("num_steps", [1000, 50])
def test_network_time_counts_the_steps(num_steps):
    path = VariancePreserving(num_steps=num_steps)
    steps = torch.arange(num_steps)
    torch.testing.assert_close(path.network_time(steps / (num_steps - 1)), steps.float())
    assert RectifiedFlow().network_time(torch.tensor([0.0, 0.25, 1.0])).tolist() == [0, 250, 1000]


@pytest.mark.parametrize("path", PATHS[1:], ids=str)
def test_variance_is_preserved_and_noise_grows(path):
    at = path(torch.linspace(0, 1, 5001, dtype=torch.float64))
    torch.testing.assert_close(at.alpha**2 + at.sigma**2, torch.ones(5001, dtype=torch.float64))
    assert (at.sigma.diff() > 0).all()
    assert (at.d_alpha < 0).all()
    assert (at.d_sigma > 0).all()


def test_ends():
    flow = RectifiedFlow()(torch.tensor([0.0, 1.0]))
    assert flow.alpha.tolist() == [1, 0]
    assert flow.sigma.tolist() == [0, 1]
    stable_diffusion = VariancePreserving()(torch.tensor([0.0, 1.0], dtype=torch.float64))
    assert stable_diffusion.alpha[0] ** 2 == pytest.approx(1 - 0.00085, rel=1e-9)
    assert stable_diffusion.alpha[1] ** 2 == pytest.approx(0.004660, rel=1e-3)  # never quite noise
    cosine = VariancePreserving("cosine")(torch.tensor([1.0]))
    assert 0 < float(cosine.alpha) < 1e-3
    assert all(bool(value.isfinite().all()) for value in cosine)


@pytest.mark.parametrize("path", PATHS, ids=str)
def test_values_come_in_the_times_own_type_and_shape(path):
    for dtype in (torch.float32, torch.float64):
        assert {(value.dtype, value.shape) for value in path(torch.rand(5, dtype=dtype))} == {(dtype, (5,))}


def test_an_unknown_schedule_is_refused():
    with pytest.raises(ConfigError, match="schedule is scaled_linear, linear or cosine, not 'squared'"):
        VariancePreserving("squared")
