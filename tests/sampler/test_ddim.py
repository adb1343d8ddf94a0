"""DDIM where the best denoiser is known, and beside diffusers' step by step."""

import pytest
import torch
from diffusers import DDIMScheduler, EulerAncestralDiscreteScheduler

from sdtrain.diffusion.path import RectifiedFlow, VariancePreserving
from sdtrain.errors import ConfigError
from sdtrain.ops.random import Draw
from sdtrain.sampler.ddim import DDIM
from sdtrain.sampler.euler import Euler

MEAN, STD = 0.7, 0.5
PATHS = [RectifiedFlow(), VariancePreserving("cosine")]


def best(path):
    """The mean of x0 given x_t, for data of N(MEAN, STD^2)."""

    def denoise(x, t):
        at = path(torch.tensor(t, dtype=torch.float64))
        gain = at.alpha * STD**2 / (at.alpha**2 * STD**2 + at.sigma**2)
        return MEAN + gain * (x - at.alpha * MEAN)

    return denoise


@pytest.mark.parametrize("path", PATHS, ids=str)
@pytest.mark.parametrize("eta", [0.0, 0.5, 1.0])
def test_it_recovers_a_gaussian(eta, path):
    draw = Draw.of(0, 4)
    noise = draw.normal("generation", (1, 64, 64)).double()
    denoise, spreads = best(path), []

    def recorded(x, t):
        at = path(torch.tensor(t, dtype=torch.float64))
        spreads.append(float(x.std() / (at.alpha**2 * STD**2 + at.sigma**2).sqrt()))
        return denoise(x, t)

    x = DDIM(num_steps=200, eta=eta)(recorded, noise, path, draw)
    assert float(x.mean()) == pytest.approx(MEAN, abs=0.02)
    assert float(x.std()) == pytest.approx(STD, rel=0.03)
    assert spreads == pytest.approx([1.0] * 200, rel=0.03)  # on its way it has the spread of noised data at every t
    if eta == 0:
        torch.testing.assert_close(x, MEAN + STD * noise, rtol=0.02, atol=0.02)  # the flow of the exact equation


def test_on_straight_paths_it_is_euler():
    noise = torch.randn(2, 1, 8, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    path = RectifiedFlow()
    torch.testing.assert_close(
        DDIM(num_steps=7)(best(path), noise, path), Euler(num_steps=7)(best(path), noise, path), rtol=1e-5, atol=1e-6
    )


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction", "sample"])
@pytest.mark.parametrize("spacing", ["leading", "trailing"])
@pytest.mark.parametrize("eta", [0.0, 0.6, 1.0])
def test_each_step_is_that_of_diffusers(eta, spacing, prediction, beside, scaled_linear):
    """With `set_alpha_to_one`, its default: the last step ends at x0 itself."""
    values = scaled_linear | {"timestep_spacing": spacing, "steps_offset": int(spacing == "leading")}
    theirs = DDIMScheduler(**values, prediction_type=prediction, clip_sample=False)
    beside.check(DDIM(20, eta, spacing=spacing), theirs, prediction, purpose="ddim", eta=eta)


@pytest.mark.parametrize("eta", [0.0, 0.9])  # at eta = 1 diffusers' first step is the root of -1e-8: NaN
def test_zero_terminal_snr_is_that_of_diffusers(eta, beside, scaled_linear):
    theirs = DDIMScheduler(
        **scaled_linear,
        prediction_type="v_prediction",
        timestep_spacing="trailing",
        rescale_betas_zero_snr=True,
        clip_sample=False,
    )
    path = VariancePreserving(zero_terminal_snr=True)
    beside.check(DDIM(20, eta, spacing="trailing"), theirs, "v_prediction", path, purpose="ddim", eta=eta)


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
@pytest.mark.parametrize(
    ("spacing", "num_steps"), [("linspace", 10), ("linspace", 20), ("leading", 20), ("trailing", 20)]
)
def test_with_eta_1_it_is_the_ancestral_euler_of_diffusers(spacing, num_steps, prediction, beside, scaled_linear):
    values = scaled_linear | {"timestep_spacing": spacing, "steps_offset": int(spacing == "leading")}
    theirs = EulerAncestralDiscreteScheduler(**values, prediction_type=prediction)
    beside.check(DDIM(num_steps, 1.0, spacing=spacing), theirs, prediction, purpose="ddim")


def test_a_samples_picture_does_not_depend_on_its_batch():
    path, draw = RectifiedFlow(), Draw.of(0, 3)
    whole = DDIM(5, eta=1.0)(best(path), draw.normal("generation", (1, 4, 4)), path, draw)
    one = Draw(0, torch.tensor([2]), torch.tensor([0]))
    alone = DDIM(5, eta=1.0)(best(path), one.normal("generation", (1, 4, 4)), path, one)
    assert torch.equal(whole[2:], alone)


def test_random_steps_want_random_numbers():
    with pytest.raises(ValueError, match="eta"):
        DDIM(5, eta=1.0)(best(PATHS[0]), torch.zeros(1, 1, 2, 2), PATHS[0])


def test_values_that_cannot_be():
    with pytest.raises(ConfigError, match="num_steps"):
        DDIM(0)
    with pytest.raises(ConfigError, match="eta=1.5 must lie between 0 and 1"):
        DDIM(eta=1.5)
