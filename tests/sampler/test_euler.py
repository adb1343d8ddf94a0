"""Euler and Heun where the solution is known, and beside diffusers' step by step.

Where they differ: with linspace and trailing diffusers starts at noise times sigma / alpha, a spread of sigma instead
of 1 (0.2 % on Stable Diffusion's schedule); we start at 1 everywhere, as diffusers does with leading.
"""

import pytest
import torch
from diffusers import (
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    FlowMatchHeunDiscreteScheduler,
    HeunDiscreteScheduler,
)

from sdtrain.diffusion.path import RectifiedFlow, VariancePreserving
from sdtrain.errors import ConfigError
from sdtrain.sampler.euler import Euler

MEAN, STD = 0.3, 0.5
PATHS = [RectifiedFlow(), VariancePreserving("cosine"), VariancePreserving()]


def best(path):
    """The mean of x0 given x_t, for data of N(MEAN, STD^2); it writes down the times it is asked at."""

    def denoise(x, t):
        denoise.times.append(t)
        at = path(torch.tensor(t, dtype=torch.float64))
        gain = at.alpha * STD**2 / (at.alpha**2 * STD**2 + at.sigma**2)
        return MEAN + gain * (x - at.alpha * MEAN)

    denoise.times = []
    return denoise


def exact(path, noise):
    """Where the flow of the probability-flow equation takes the noise: a Gaussian keeps its quantiles."""
    start = path(torch.tensor(1.0, dtype=torch.float64))
    return MEAN + STD * (noise - start.alpha * MEAN) / (start.alpha**2 * STD**2 + start.sigma**2).sqrt()


@pytest.fixture(scope="module")
def noise():
    return torch.randn(1, 4, 32, 32, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


@pytest.mark.parametrize("path", PATHS, ids=str)
@pytest.mark.parametrize("heun", [False, True])
def test_they_recover_a_gaussian(heun, path, noise):
    x = Euler(num_steps=200, heun=heun)(best(path), noise, path)
    torch.testing.assert_close(x, exact(path, noise), rtol=0.03, atol=0.02)
    assert float(x.mean()) == pytest.approx(MEAN, abs=0.03)
    assert float(x.std()) == pytest.approx(STD, rel=0.03)


@pytest.mark.parametrize(("heun", "ratio"), [(False, 2.0), (True, 4.0)])
@pytest.mark.parametrize("shift", [1.0, 2.0])
def test_the_order_of_the_error(heun, ratio, shift, noise):
    path = RectifiedFlow()
    errors = [
        float((Euler(n, shift, heun)(best(path), noise, path) - exact(path, noise)).abs().mean()) for n in (16, 32, 64)
    ]
    for coarse, fine in zip(errors, errors[1:]):
        assert coarse / fine == pytest.approx(ratio, rel=0.15)


SPACINGS = {
    "linspace": {"timestep_spacing": "linspace"},
    "leading": {"timestep_spacing": "leading", "steps_offset": 1},
    "trailing": {"timestep_spacing": "trailing"},
    "karras": {"use_karras_sigmas": True},
}


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
@pytest.mark.parametrize("spacing", SPACINGS)
@pytest.mark.parametrize("num_steps", [10, 20])
@pytest.mark.parametrize(("heun", "theirs"), [(False, EulerDiscreteScheduler), (True, HeunDiscreteScheduler)])
def test_each_step_is_that_of_diffusers(heun, theirs, num_steps, spacing, prediction, beside, scaled_linear):
    theirs = theirs(**scaled_linear, **SPACINGS[spacing], prediction_type=prediction)
    beside.check(Euler(num_steps, heun=heun, spacing=spacing), theirs, prediction)


@pytest.mark.parametrize("shift", [1.0, 3.0])
@pytest.mark.parametrize("num_steps", [1, 10, 28])
@pytest.mark.parametrize(
    ("heun", "theirs"), [(False, FlowMatchEulerDiscreteScheduler), (True, FlowMatchHeunDiscreteScheduler)]
)
def test_each_step_of_a_flow_is_that_of_diffusers(heun, theirs, num_steps, shift, beside):
    beside.check(Euler(num_steps, shift, heun, spacing="linspace"), theirs(shift=shift), "flow")


def test_the_times_and_the_cost():
    path, x = RectifiedFlow(), torch.zeros(1, 1, 2, 2)
    plain, shifted, twice = best(path), best(path), best(path)
    Euler(4)(plain, x, path)
    assert plain.times == [1.0, 0.75, 0.5, 0.25]
    Euler(4, shift=3.0)(shifted, x, path)
    assert shifted.times == pytest.approx([1.0, 0.9, 0.75, 0.5])
    Euler(4, heun=True)(twice, x, path)
    assert twice.times == [1.0, 0.75, 0.75, 0.5, 0.5, 0.25, 0.25]


def test_one_step_is_the_prediction_itself():
    path, x = RectifiedFlow(), torch.ones(1, 1, 2, 2)
    assert torch.equal(Euler(1)(lambda x, t: 2 * x, x, path), 2 * x)


def test_no_steps_are_refused():
    with pytest.raises(ConfigError, match="num_steps"):
        Euler(0)
