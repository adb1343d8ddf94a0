"""DPM-Solver++ 2M and its SDE beside diffusers' step by step.

Where they differ: diffusers rounds the times that it tells the network (linspace, karras); we do not. Its `leading` is
our `leading_open`, its `linspace` our `uniform`.
"""

import pytest
import torch
from diffusers import DPMSolverMultistepScheduler

from sdtrain.diffusion.path import RectifiedFlow, VariancePreserving
from sdtrain.sampler.ddim import DDIM
from sdtrain.sampler.dpmpp import DPMpp

SPACINGS = {
    "uniform": {"timestep_spacing": "linspace"},
    "leading_open": {"timestep_spacing": "leading", "steps_offset": 1},
    "trailing": {"timestep_spacing": "trailing"},
    "karras": {"use_karras_sigmas": True},
}


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
@pytest.mark.parametrize("spacing", SPACINGS)
@pytest.mark.parametrize(("sde", "algorithm"), [(False, "dpmsolver++"), (True, "sde-dpmsolver++")])
@pytest.mark.parametrize("num_steps", [9, 27])  # 999 divides by both: no time of `uniform` is rounded
def test_each_step_is_that_of_diffusers(num_steps, sde, algorithm, spacing, prediction, beside, scaled_linear):
    values = scaled_linear | SPACINGS[spacing]
    theirs = DPMSolverMultistepScheduler(**values, prediction_type=prediction, algorithm_type=algorithm)
    beside.check(DPMpp(num_steps, sde, spacing=spacing), theirs, prediction, purpose="dpmpp")


def test_two_steps_are_ddim():
    noise = torch.randn(2, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    denoise = lambda x, t: torch.sin(x + t)  # noqa: E731
    path = VariancePreserving()
    one, ddim = DPMpp(2)(denoise, noise, path), DDIM(2)(denoise, noise, path)
    torch.testing.assert_close(one, ddim)
    assert not torch.allclose(DPMpp(3)(denoise, noise, path), DDIM(3)(denoise, noise, path), atol=1e-3)


def test_the_sde_wants_random_numbers():
    with pytest.raises(ValueError, match="sde"):
        DPMpp(5, sde=True)(lambda x, t: x, torch.zeros(1, 1, 2, 2), RectifiedFlow())
