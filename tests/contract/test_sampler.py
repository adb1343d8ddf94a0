"""What every sampler of configs/sampler/ must do on every path, where the best denoiser is known."""

from functools import cache

import pytest
import torch
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf

from sdtrain.build import build
from sdtrain.config import config_directory
from sdtrain.diffusion.path import EDM, RectifiedFlow, VariancePreserving
from sdtrain.diffusion.prediction import KINDS, check, target, to_x0
from sdtrain.errors import ConfigError
from sdtrain.ops.random import Draw
from sdtrain.sampler.spacing import Spacing, levels, start

NAMES = sorted(path.stem for path in (config_directory() / "sampler").glob("*.yaml"))
SPACINGS = Spacing.__args__
PATHS = {
    "flow": RectifiedFlow(),
    "vp": VariancePreserving(),
    "linear": VariancePreserving("linear", beta_start=1e-4, beta_end=0.02),
    "cosine": VariancePreserving("cosine"),
    "zero_snr": VariancePreserving(zero_terminal_snr=True),
    "edm": EDM(),
}
MEAN = torch.tensor([0.3, -0.5, 0.1], dtype=torch.float64)
COVARIANCE = torch.tensor([[0.5, 0.3, 0.0], [0.3, 0.4, -0.1], [0.0, -0.1, 0.1]], dtype=torch.float64)
SPREADS, AXES = torch.linalg.eigh(COVARIANCE)


@pytest.fixture(scope="module")
def samplers():
    """name, and values that go before the YAML's -> sampler."""
    with initialize_config_dir(str(config_directory()), version_base="1.3"):
        nodes = {name: compose(f"sampler/{name}").sampler for name in NAMES}
    return lambda name, **values: build(OmegaConf.create({"sampler": {**nodes[name], **values}}).sampler)


def is_random(sampler):
    try:
        sampler(lambda x, t: x, torch.zeros(1, 3, 1, 1), PATHS["vp"])
    except ValueError:
        return True
    return False


@cache
def level(path, t):
    at = path(torch.tensor(t, dtype=torch.float64))
    return float(at.alpha), float(at.sigma)


def along_axes(x, centre, values, new_centre):
    """x (B, 3, h, w) moved to a new centre, and scaled along each principal axis of COVARIANCE by its value."""
    matrix = AXES * values @ AXES.T
    return torch.einsum("ij,bjhw->bihw", matrix, x - centre[:, None, None]) + new_centre[:, None, None]


def gaussian(path):
    """The mean of x0 given x_t, for channels of N(MEAN, COVARIANCE); it remembers the last t it was asked at."""

    def denoise(x, t):
        denoise.last = t
        a, s = level(path, t)
        return along_axes(x, a * MEAN, a * SPREADS / (a**2 * SPREADS + s**2), MEAN)

    return denoise


def flow(path, x, begin, end):
    """Where the probability-flow equation takes x: along each principal axis a Gaussian keeps its quantiles."""
    (a, s), (b, r) = level(path, begin), level(path, end)
    return along_axes(x, a * MEAN, ((b**2 * SPREADS + r**2) / (a**2 * SPREADS + s**2)).sqrt(), b * MEAN)


@pytest.mark.parametrize("path", PATHS.values(), ids=PATHS)
@pytest.mark.parametrize("name", NAMES)
def test_it_recovers_mean_and_covariance(name, path, samplers):
    draw = Draw.of(0, 1)
    noise = draw.normal("generation", (3, 48, 48)).double()
    x = samplers(name, num_steps=120)(gaussian(path), noise, path, draw)
    values = x.flatten(2)[0]  # (C, h w)
    # 2304 values, and 120 steps: the ancestral samplers' exact variance is then 0.045 less than 0.5 on edm.
    torch.testing.assert_close(values.mean(dim=1), MEAN, rtol=0, atol=0.04)
    torch.testing.assert_close(values.cov(), COVARIANCE, rtol=0.06, atol=0.05)


@pytest.mark.parametrize("path", PATHS.values(), ids=PATHS)
@pytest.mark.parametrize("name", NAMES)
def test_its_error_falls_with_its_order(name, path, samplers):
    """With spacing=karras, whose steps in log-SNR shrink everywhere alike; against the flow to the last time asked."""
    if is_random(samplers(name)):
        pytest.skip("its error is that of its distribution")
    noise = Draw.of(0, 1).normal("generation", (3, 8, 8)).double()
    errors = []
    for num_steps in (16, 32, 64):
        sampler, denoise = samplers(name, num_steps=num_steps, spacing="karras", shift=1.0), gaussian(path)
        x = sampler(denoise, noise, path)
        first = levels(path, num_steps, "karras", 1.0)[0]
        exact = flow(path, start(noise, first), first.t, denoise.last)
        errors.append(float((x - denoise(exact, denoise.last)).abs().mean()))
    orders = torch.tensor([a / b for a, b in zip(errors, errors[1:])]).log2()
    assert (orders > sampler.order - 0.2).all(), orders
    assert float(orders[-1]) < sampler.order + 0.5, f"{orders}: its stated order is too modest"


@pytest.mark.parametrize("path", ["flow", "zero_snr", "edm"])
@pytest.mark.parametrize("spacing", SPACINGS)
@pytest.mark.parametrize("name", NAMES)
def test_with_every_spacing_more_steps_are_better(name, spacing, path, samplers):
    """And none is NaN, on paths that start at alpha = 0 as on others."""
    path, draw = PATHS[path], Draw.of(0, 1)
    noise = draw.normal("generation", (3, 32, 32)).double()

    def distance(num_steps):
        x = samplers(name, num_steps=num_steps, spacing=spacing)(gaussian(path), noise, path, draw).flatten(2)[0]
        return float((x.cov() - COVARIANCE).abs().sum() + (x.mean(dim=1) - MEAN).abs().sum())

    few, many = distance(2), distance(24)
    # Of the 12 numbers, 1024 values each. The last step of `leading` is long in log-SNR, and a multistep SDE solver
    # extrapolates the noise of its last x0 over it (diffusers' too; with it goes `leading_open`).
    assert many < max(few, 0.1) or (name, spacing) == ("dpmpp_sde", "leading") and many < 1


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("path", PATHS.values(), ids=PATHS)
@pytest.mark.parametrize("name", NAMES)
def test_it_takes_every_prediction_that_the_path_allows(name, path, kind, samplers):
    """Through the network's output, as it trains: all that a sampler reads is `to_x0` of what the network says."""
    try:
        check(kind, path)
    except ConfigError:
        pytest.skip("refused by name")
    draw = Draw.of(0, 1)
    noise, best = draw.normal("generation", (3, 4, 4)), gaussian(path)

    def through(x, t):
        at = path(torch.tensor(t, dtype=torch.float64))
        x0 = best(x.double(), t)
        output = target(kind, x0, (x.double() - at.alpha * x0) / at.sigma, at)
        return to_x0(kind, output, x.double(), at).float()

    sampler = samplers(name, num_steps=6)
    x = sampler(through, noise, path, draw)
    direct = sampler(lambda x, t: best(x.double(), t).float(), noise, path, draw)
    assert x.dtype == torch.float32
    torch.testing.assert_close(x, direct, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("name", NAMES)
def test_it_is_a_function_of_the_seed_and_the_sample(name, samplers):
    path, sampler = PATHS["flow"], samplers(name, num_steps=5)

    def sample(seed, ids):
        ids = torch.tensor(ids)
        draw = Draw(seed, ids, torch.zeros_like(ids))
        return sampler(gaussian(path), draw.normal("generation", (3, 4, 4)).double(), path, draw)

    torch.manual_seed(1)
    state = torch.get_rng_state()
    whole = sample(0, [0, 1, 2, 3])
    assert torch.equal(torch.get_rng_state(), state)  # the global generator is not touched
    torch.manual_seed(2)
    assert torch.equal(sample(0, [0, 1, 2, 3]), whole)
    for split in ([[0, 1], [2, 3]], [[0], [1, 2, 3]]):
        torch.testing.assert_close(torch.cat([sample(0, ids) for ids in split]), whole, rtol=1e-12, atol=1e-12)
    assert not torch.allclose(sample(1, [0, 1, 2, 3]), whole, atol=0.01)


@pytest.mark.parametrize("name", NAMES)
def test_one_step_is_the_prediction_itself(name, samplers):
    noise = torch.ones(2, 3, 2, 2)
    x = samplers(name, num_steps=1)(lambda x, t: 2 * x, noise, PATHS["flow"], Draw.of(0, 2))
    assert torch.equal(x, 2 * noise)
