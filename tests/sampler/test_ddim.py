"""DDIM where the best denoiser is known, and beside diffusers' step by step."""

import pytest
import torch
from diffusers import DDIMScheduler

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
@pytest.mark.parametrize("eta", [0.0, 0.6, 1.0])
def test_each_step_is_that_of_diffusers(eta, prediction):
    num_steps, path = 20, VariancePreserving(num_steps=1001)  # our t = i / 20 is their step 50 i - 1
    alpha_bar = path(torch.linspace(0, 1, 1001, dtype=torch.float64)).alpha.square()
    theirs = DDIMScheduler(prediction_type=prediction, clip_sample=False, timestep_spacing="trailing")
    theirs.alphas_cumprod = alpha_bar[1:]
    theirs.set_timesteps(num_steps)
    draw = Draw.of(0, 2)
    noise = draw.normal("generation", (4, 8, 8)).double()
    denoise, seen = best(path), []

    def recorded(x, t):
        seen.append(x)
        return denoise(x, t)

    last = DDIM(num_steps, eta)(recorded, noise, path, draw)

    x = noise
    for i, step in enumerate(theirs.timesteps):
        torch.testing.assert_close(seen[i], x, rtol=1e-4, atol=1e-5)
        a, s = alpha_bar[step + 1].sqrt(), (1 - alpha_bar[step + 1]).sqrt()
        x0 = denoise(x, float(step + 1) / 1000)
        epsilon = (x - a * x0) / s
        output = {"epsilon": epsilon, "v_prediction": a * epsilon - s * x0, "sample": x0}[prediction]
        z = draw.normal(f"ddim.{i}", x.shape[1:]).double()
        x = theirs.step(output, step, x, eta=eta, variance_noise=z if eta else None).prev_sample
    torch.testing.assert_close(last, x, rtol=1e-4, atol=1e-5)


def test_a_samples_picture_does_not_depend_on_its_batch():
    path, draw = RectifiedFlow(), Draw.of(0, 3)
    whole = DDIM(5, eta=1.0)(best(path), draw.normal("generation", (1, 4, 4)), path, draw)
    one = Draw(0, torch.tensor([2]), torch.tensor([0]))
    alone = DDIM(5, eta=1.0)(best(path), one.normal("generation", (1, 4, 4)), path, one)
    assert torch.equal(whole[2:], alone)


def test_random_steps_want_random_numbers():
    with pytest.raises(ValueError, match="eta"):
        DDIM(5, eta=1.0)(best(PATHS[0]), torch.zeros(1, 1, 2, 2), PATHS[0])


def test_no_steps_are_refused():
    with pytest.raises(ConfigError, match="num_steps"):
        DDIM(0)
