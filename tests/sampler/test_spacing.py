"""The times: against diffusers' on its 1000 steps, and what every path must get."""

import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DPMSolverMultistepScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
)

from sdtrain.diffusion.path import EDM, RectifiedFlow, VariancePreserving
from sdtrain.errors import ConfigError
from sdtrain.sampler.spacing import Spacing, check, levels, start

SPACINGS = Spacing.__args__
PATHS = [
    RectifiedFlow(),
    VariancePreserving(),
    VariancePreserving("cosine"),
    VariancePreserving(zero_terminal_snr=True),
    EDM(),
]


@pytest.mark.parametrize("num_steps", [1, 7, 16, 20, 30, 50, 333, 999, 1000])
@pytest.mark.parametrize(
    ("spacing", "theirs", "values"),
    [
        ("linspace", EulerDiscreteScheduler, {"timestep_spacing": "linspace"}),
        ("leading", DDIMScheduler, {"timestep_spacing": "leading", "steps_offset": 1}),
        ("trailing", DDIMScheduler, {"timestep_spacing": "trailing"}),
        ("leading_open", DPMSolverMultistepScheduler, {"timestep_spacing": "leading", "steps_offset": 1}),
    ],
)
def test_the_steps_are_those_of_diffusers(spacing, theirs, values, num_steps):
    if (spacing, num_steps) in {("leading", 1000), ("leading_open", 999), ("leading_open", 1000), ("linspace", 1)}:
        pytest.skip("there diffusers leaves its own steps, or takes the last one alone")
    theirs = theirs(**values)
    theirs.set_timesteps(num_steps)
    ours = [level.t * 999 for level in levels(VariancePreserving(), num_steps, spacing, 1.0)[:-1]]
    assert ours == pytest.approx(theirs.timesteps.tolist(), abs=1e-4)


@pytest.mark.parametrize("num_steps", [1, 10, 25])
def test_the_sigmas_of_karras_are_those_of_diffusers(num_steps, scaled_linear):
    theirs = DPMSolverMultistepScheduler(**scaled_linear, use_karras_sigmas=True)
    theirs.set_timesteps(num_steps)
    line = levels(VariancePreserving(), num_steps, "karras", 1.0)
    assert [level.sigma / level.alpha for level in line] == pytest.approx(theirs.sigmas.tolist(), rel=1e-4)


@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_the_sigmas_of_flows_are_those_of_diffusers(shift):
    theirs = FlowMatchEulerDiscreteScheduler(shift=shift)
    theirs.set_timesteps(28)
    line = levels(RectifiedFlow(), 28, "linspace", shift)
    assert [level.sigma for level in line] == pytest.approx(theirs.sigmas.tolist(), abs=1e-6)
    theirs.set_timesteps(sigmas=[1 - i / 28 for i in range(28)])  # as the Flux pipeline does
    line = levels(RectifiedFlow(), 28, "uniform", shift)
    assert [level.sigma for level in line] == pytest.approx(theirs.sigmas.tolist(), abs=1e-6)


@pytest.mark.parametrize("path", PATHS, ids=str)
@pytest.mark.parametrize("spacing", SPACINGS)
@pytest.mark.parametrize("shift", [1.0, 2.5])
def test_on_every_path_they_fall_and_end_at_the_data(shift, spacing, path):
    for num_steps in (1, 2, 25, 999):
        line = levels(path, num_steps, spacing, shift)
        assert len(line) == num_steps + 1
        assert line[-1] == (0.0, 1.0, 0.0)
        times = [level.t for level in line[:-1]]
        assert all(a > b >= 0 for a, b in zip(times, times[1:]))
        assert all(0 < a <= 1 for a in times[:1])
        assert all(level.sigma > 0 for level in line[:-1])  # a step divides by it
        if "leading" not in spacing:
            assert times[0] == 1.0
        for level in line[:-1]:
            at = path(torch.tensor(level.t, dtype=torch.float64))
            assert (level.alpha, level.sigma) == pytest.approx((float(at.alpha), float(at.sigma)))


def test_the_start_has_the_spread_of_noised_data():
    noise = torch.ones(1, 1, 2, 2)
    assert torch.equal(start(noise, levels(RectifiedFlow(), 5, "uniform", 1.0)[0]), noise)
    torch.testing.assert_close(start(noise, levels(VariancePreserving(), 5, "leading", 1.0)[0]), noise)
    torch.testing.assert_close(start(noise, levels(EDM(), 5, "karras", 1.0)[0]), noise * (1 + 80**2) ** 0.5)


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ((0, "uniform", 1.0), "sampler.num_steps=0 must be at least 1"),
        ((5, "trailling", 1.0), "sampler.spacing=trailling is none of uniform, linspace"),
        ((5, "uniform", 0.0), "sampler.shift=0.0 must be above 0"),
    ],
)
def test_what_no_path_could_take(values, expected):
    with pytest.raises(ConfigError, match=expected):
        check(*values)


@pytest.mark.parametrize(("spacing", "num_steps"), [("leading", 1001), ("trailing", 1001), ("leading_open", 1000)])
def test_more_steps_than_there_are(spacing, num_steps):
    with pytest.raises(ConfigError, match="more than the path's 1000 steps"):
        levels(VariancePreserving(), num_steps, spacing, 1.0)


def test_a_shift_that_leaves_one_time_only():
    with pytest.raises(ConfigError, match=r"sampler.shift=1e\+18 with num_steps=4: no two"):
        levels(RectifiedFlow(), 4, "uniform", 1e18)
