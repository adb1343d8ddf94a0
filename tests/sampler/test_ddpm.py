"""DDPM beside diffusers' step by step.

Where they differ: the last step. diffusers adds noise there unless it is from timestep 0; we never do (Ho et al. 2020,
algorithm 2).
"""

import pytest
import torch
from diffusers import DDPMScheduler

from sdtrain.diffusion.path import EDM, RectifiedFlow, VariancePreserving
from sdtrain.errors import ConfigError
from sdtrain.ops.random import Draw
from sdtrain.sampler.ddim import DDIM
from sdtrain.sampler.ddpm import DDPM

THEIRS = {"fixed_small": "fixed_small", "fixed_large": "fixed_large", "learned": "learned_range"}


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction", "sample"])
@pytest.mark.parametrize("spacing", ["leading", "trailing"])
@pytest.mark.parametrize("variance", THEIRS)
def test_each_step_is_that_of_diffusers(variance, spacing, prediction, beside, scaled_linear):
    values = scaled_linear | {"timestep_spacing": spacing, "steps_offset": int(spacing == "leading")}
    theirs = DDPMScheduler(**values, prediction_type=prediction, variance_type=THEIRS[variance], clip_sample=False)
    v = torch.sigmoid if variance == "learned" else None
    last = None if variance == "fixed_small" else -1  # there diffusers' noise has variance 1e-20
    beside.check(DDPM(20, variance, spacing=spacing), theirs, prediction, v=v, last=last, purpose="ddpm")


@pytest.mark.slow
@pytest.mark.parametrize("variance", THEIRS)
def test_all_thousand_steps(variance, beside):
    theirs = DDPMScheduler(variance_type=THEIRS[variance], clip_sample=False)
    v = torch.sigmoid if variance == "learned" else None
    path = VariancePreserving("linear", beta_start=1e-4, beta_end=0.02)
    beside.check(DDPM(1000, variance, spacing="leading"), theirs, path=path, v=v, purpose="ddpm")


@pytest.mark.parametrize("path", [VariancePreserving(), RectifiedFlow(), EDM()], ids=str)
def test_fixed_large_is_exact_for_data_of_variance_1(path):
    """And fixed_small for data of none: it ends at its mean however few the steps."""
    draw = Draw.of(0, 1)
    noise = draw.normal("generation", (1, 64, 64)).double()

    def unit(x, t):
        at = path(torch.tensor(t, dtype=torch.float64))
        unit.spreads.append(float(x.std() / (at.alpha**2 + at.sigma**2).sqrt()))
        return at.alpha / (at.alpha**2 + at.sigma**2) * x

    unit.spreads = []
    DDPM(8, "fixed_large")(unit, noise, path, draw)
    assert unit.spreads == pytest.approx([1.0] * 8, rel=0.03)
    x = DDPM(8)(lambda x, t: torch.full_like(x, 0.7), noise, path, draw)
    torch.testing.assert_close(x, torch.full_like(x, 0.7))


def test_fixed_small_is_ddim_with_eta_1():
    class Same(Draw):
        def normal(self, purpose, shape=()):
            return super().normal(purpose.split(".")[-1], shape)

    draw = Same(0, torch.arange(2), torch.zeros(2, dtype=torch.int64))
    noise, denoise = draw.normal("generation", (3, 4, 4)).double(), lambda x, t: torch.sin(x + t)
    ours = DDPM(9)(denoise, noise, RectifiedFlow(), draw)
    torch.testing.assert_close(ours, DDIM(9, eta=1.0)(denoise, noise, RectifiedFlow(), draw))


def test_it_says_whether_it_wants_a_learned_variance():
    assert [DDPM(variance=variance).learned_variance for variance in THEIRS] == [False, False, True]
    with pytest.raises(ConfigError, match="variance=large is none of fixed_small, fixed_large, learned"):
        DDPM(5, "large")


def test_it_wants_random_numbers():
    with pytest.raises(ValueError, match="draw"):
        DDPM(5)(lambda x, t: x, torch.zeros(1, 1, 2, 2), RectifiedFlow())
