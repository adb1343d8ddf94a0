"""UniPC beside diffusers' step by step.

Where they differ: as DPM-Solver++'s do, see `test_dpmpp.py`; and on flows diffusers starts at sigma = 1 - 1e-6 and
extrapolates over the log-SNR from there, where we take the second step at order 1.
"""

import pytest
import torch
from diffusers import UniPCMultistepScheduler

from sdtrain.errors import ConfigError
from sdtrain.sampler.unipc import UniPC, weights

SPACINGS = {
    "uniform": {"timestep_spacing": "linspace"},
    "leading_open": {"timestep_spacing": "leading", "steps_offset": 1},
    "trailing": {"timestep_spacing": "trailing"},
    "karras": {"use_karras_sigmas": True},
}


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
@pytest.mark.parametrize("spacing", SPACINGS)
@pytest.mark.parametrize("order", [1, 2, 3])
@pytest.mark.parametrize("num_steps", [9, 27])  # 999 divides by both: no time of `uniform` is rounded
def test_each_step_is_that_of_diffusers(num_steps, order, spacing, prediction, beside, scaled_linear):
    values = scaled_linear | SPACINGS[spacing]
    theirs = UniPCMultistepScheduler(**values, prediction_type=prediction, solver_order=order)
    beside.check(UniPC(num_steps, order, spacing=spacing), theirs, prediction)


@pytest.mark.parametrize("h", [0.3, 2.0])
@pytest.mark.parametrize("nodes", [[-0.7, 1.0], [-0.8, -1.9, 1.0], [-1.0, -2.0]])
def test_the_weights_integrate_polynomials(nodes, h):
    """Integral of e^(lambda - h) times lambda^k over the step, against what the weighted differences give."""
    u = torch.linspace(0, 1, 20001, dtype=torch.float64)
    for k in range(1, len(nodes) + 1):
        exact = torch.trapezoid(h * torch.exp(h * (u - 1)) * u**k, u)
        # advance() multiplies by 1 - e^-h, and its slopes are (node^k - 0) / node
        found = -torch.expm1(torch.tensor(-h)) * sum(w * node ** (k - 1) for w, node in zip(weights(nodes, h), nodes))
        torch.testing.assert_close(found.double(), exact, rtol=1e-5, atol=1e-7)


def test_an_order_that_does_not_exist():
    with pytest.raises(ConfigError, match="solver_order=4"):
        UniPC(solver_order=4)
