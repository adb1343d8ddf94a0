"""Noise paths: their derivatives, their ends, and the same schedules as diffusers'."""

import math

import pytest
import torch
from diffusers import DDIMScheduler, DDPMScheduler
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from sdtrain.diffusion.path import EDM, RectifiedFlow, VariancePreserving
from sdtrain.errors import ConfigError

SCHEDULES = ("scaled_linear", "linear", "cosine")
DIFFUSERS = {"scaled_linear": "scaled_linear", "linear": "linear", "cosine": "squaredcos_cap_v2"}
PRESERVING = [VariancePreserving(s, zero_terminal_snr=zero) for s in SCHEDULES for zero in (False, True)]
PATHS = [RectifiedFlow(), EDM(), EDM(0.01, 20.0, rho=3.0), *PRESERVING]
BETWEEN = (torch.arange(999, dtype=torch.float64) + 0.37) / 999  # between a schedule's steps, where it is smooth


@pytest.mark.parametrize("path", PATHS, ids=str)
def test_derivatives_agree_with_finite_differences_and_autograd(path):
    h = 1e-7
    at, after, before = path(BETWEEN), path(BETWEEN + h), path(BETWEEN - h)
    for name in ("alpha", "sigma"):
        said = getattr(at, f"d_{name}")
        expected = (getattr(after, name) - getattr(before, name)) / (2 * h)
        torch.testing.assert_close(said, expected, rtol=1e-5, atol=1e-6)
        t = BETWEEN.clone().requires_grad_()
        value = getattr(path(t), name)
        slope = torch.autograd.grad(value.sum(), t, allow_unused=True)[0] if value.requires_grad else None
        torch.testing.assert_close(said, torch.zeros_like(t) if slope is None else slope)


@pytest.mark.parametrize("zero_terminal_snr", [False, True])
@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("scheduler", [DDIMScheduler, DDPMScheduler])
def test_every_step_is_that_of_diffusers(scheduler, schedule, zero_terminal_snr):
    options = {"rescale_betas_zero_snr": zero_terminal_snr}
    alpha_bar = scheduler(1000, 0.00085, 0.012, DIFFUSERS[schedule], **options).alphas_cumprod
    path = VariancePreserving(schedule, zero_terminal_snr=zero_terminal_snr)
    at = path(torch.arange(1000, dtype=torch.float64) / 999)
    torch.testing.assert_close(at.alpha.square().float(), alpha_bar, rtol=5e-4, atol=1e-9)
    torch.testing.assert_close(at.alpha.square().float(), alpha_bar, rtol=0, atol=2e-6)


@pytest.mark.parametrize("path", PRESERVING, ids=str)
def test_a_float32_time_of_a_step_is_that_step(path):
    """i / 999 in float32 lies beside the step by a rounding, and may not miss it, however steep the schedule is."""
    single, double = path(torch.arange(1000) / 999), path(torch.arange(1000, dtype=torch.float64) / 999)
    for name in ("alpha", "sigma", "d_alpha", "d_sigma"):
        torch.testing.assert_close(getattr(single, name).double(), getattr(double, name), rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("path", PATHS, ids=str)
def test_float32_is_accurate_between_the_steps_too(path):
    t = BETWEEN.float()
    single, double = path(t), path(t.double())
    for name in ("alpha", "sigma", "d_alpha", "d_sigma"):
        torch.testing.assert_close(getattr(single, name).double(), getattr(double, name), rtol=2e-4, atol=1e-6)


def test_steps_need_no_equal_number_of_times():
    coarse = VariancePreserving(num_steps=50)(torch.linspace(0, 1, 50))
    assert coarse.alpha[0] ** 2 == pytest.approx(1 - 0.00085, rel=1e-6)
    assert bool((coarse.alpha.diff() < 0).all())


@pytest.mark.parametrize("num_steps", [1000, 50])
def test_network_time_counts_the_steps(num_steps):
    path = VariancePreserving(num_steps=num_steps)
    steps = torch.arange(num_steps)
    assert torch.equal(path.network_time(steps / (num_steps - 1)), steps.float())
    assert float(path.network_time(torch.tensor(10.5 / (num_steps - 1)))) == pytest.approx(10.5, rel=1e-5)


def test_network_times_of_the_others():
    assert RectifiedFlow().network_time(torch.tensor([0.0, 0.25, 1.0])).tolist() == [0, 250, 1000]
    found = EDM().network_time(torch.tensor([0.0, 1.0], dtype=torch.float64))
    assert found.tolist() == pytest.approx([math.log(0.002) / 4, math.log(80) / 4])
    t = torch.rand(50, dtype=torch.float64)
    torch.testing.assert_close(EDM(time_scale=2.0).network_time(t), 2 * EDM()(t).sigma.log())


@pytest.mark.parametrize("path", PRESERVING, ids=str)
def test_variance_is_preserved_and_noise_grows(path):
    at = path(torch.linspace(0, 1, 5001, dtype=torch.float64))
    torch.testing.assert_close(at.alpha**2 + at.sigma**2, torch.ones(5001, dtype=torch.float64))
    assert (at.alpha.diff() < 0).all()
    assert (at.sigma.diff() > 0).all()
    assert (at.d_alpha < 0).all()
    assert (at.d_sigma[:-1] > 0).all()


def test_ends():
    flow = RectifiedFlow()(torch.tensor([0.0, 1.0]))
    assert flow.alpha.tolist() == [1, 0]
    assert flow.sigma.tolist() == [0, 1]
    stable_diffusion = VariancePreserving()(torch.tensor([0.0, 1.0], dtype=torch.float64))
    assert stable_diffusion.alpha[0] ** 2 == pytest.approx(1 - 0.00085, rel=1e-9)
    assert stable_diffusion.alpha[1] ** 2 == pytest.approx(0.004660, rel=1e-3)  # never quite noise
    assert 0 < float(VariancePreserving("cosine")(torch.tensor([1.0])).alpha) < 1e-3
    edm = EDM()(torch.tensor([0.0, 1.0], dtype=torch.float64))
    assert edm.alpha.tolist() == [1, 1]
    assert edm.sigma.tolist() == pytest.approx([0.002, 80])


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_a_rescaled_schedule_ends_in_noise_alone(schedule):
    plain, path = VariancePreserving(schedule), VariancePreserving(schedule, zero_terminal_snr=True)
    for dtype in (torch.float32, torch.float64):
        at = path(torch.tensor([0.0, 1.0], dtype=dtype))
        assert at.alpha[1] == 0
        assert at.sigma[1] == 1
        assert at.d_alpha[1] < 0
        assert at.d_sigma[1] == 0
        torch.testing.assert_close(at.alpha[0], plain(torch.zeros((), dtype=dtype)).alpha)  # the first step stays


@pytest.mark.parametrize("path", PATHS, ids=str)
def test_values_are_finite_and_come_in_the_times_own_type_and_shape(path):
    for dtype in (torch.float32, torch.float64):
        for t in (torch.linspace(0, 1, 4001, dtype=dtype), torch.tensor(0.3, dtype=dtype)):
            at = path(t)
            assert {(value.dtype, value.shape) for value in at} == {(dtype, t.shape)}
            assert all(bool(value.isfinite().all()) for value in (*at, path.network_time(t), path.input_scale(t)))


@pytest.mark.parametrize("path", PATHS, ids=str)
def test_the_networks_input_has_at_most_unit_variance(path):
    t = torch.linspace(0, 1, 101, dtype=torch.float64)
    at = path(t)
    scaled = path.input_scale(t) * torch.hypot(at.alpha, at.sigma)
    assert bool((scaled <= 1 + 1e-12).all())
    if not isinstance(path, RectifiedFlow):
        torch.testing.assert_close(scaled, torch.ones_like(t))


@pytest.mark.parametrize("path", PATHS, ids=str)
def test_the_time_of_a_ratio_is_the_way_back(path):
    for t, tolerance in ((torch.linspace(0, 1, 1501, dtype=torch.float64), 1e-9), (torch.linspace(0, 1, 1501), 2e-6)):
        at = path(t)
        torch.testing.assert_close(path.time_of(at.sigma / at.alpha), t, rtol=0, atol=tolerance)
    assert path.time_of(torch.tensor([0.0, float("inf")])).tolist() == [0, 1]


class NoDouble(TorchDispatchMode):
    """Fails where a float64 tensor is made on a device that has none."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        made = function(*args, **(kwargs or {}))
        for value in tree_leaves(made):
            is_double = isinstance(value, torch.Tensor) and value.dtype == torch.float64
            assert not (is_double and value.device.type == "meta"), f"{function} makes float64"
        return made


@pytest.mark.parametrize("path", PATHS, ids=str)
def test_nothing_is_float64_on_the_device(path):
    t = torch.rand(5, device="meta")
    with NoDouble():
        made = (*type(path)()(t), path.network_time(t), path.input_scale(t), path.time_of(t))
    assert {(value.dtype, value.device.type) for value in made} == {(torch.float32, "meta")}


def test_what_cannot_be_is_refused():
    with pytest.raises(ConfigError, match="schedule is scaled_linear, linear or cosine, not 'squared'"):
        VariancePreserving("squared")
    with pytest.raises(ConfigError, match="num_steps=1 must be at least 2"):
        VariancePreserving(num_steps=1)
    with pytest.raises(ConfigError, match="sigma_min=0.0"):
        EDM(sigma_min=0.0)
    for betas in ({"beta_end": 1.2}, {"beta_start": 0.0}, {"beta_start": -0.1}):
        with pytest.raises(ConfigError, match="must lie between 0 and 1"):
            VariancePreserving(**betas)
    with pytest.raises(ConfigError, match="time_scale=0 must be above 0"):
        RectifiedFlow(time_scale=0)
    for wrong in ({"rho": -1.0}, {"rho": 0}, {"time_scale": 0.0}):
        with pytest.raises(ConfigError, match="must be above 0"):
            EDM(**wrong)
