"""Every conversion between predictions, there and back, at every t."""

import pytest
import torch

from sdtrain.contracts import PathPoint
from sdtrain.diffusion import prediction as predictions
from sdtrain.diffusion.path import EDM, RectifiedFlow, VariancePreserving
from sdtrain.diffusion.prediction import KINDS
from sdtrain.errors import ConfigError

ZERO_SNR = VariancePreserving(zero_terminal_snr=True)
PATHS = [RectifiedFlow(), VariancePreserving(), VariancePreserving("cosine"), ZERO_SNR, EDM()]
ENDS_IN_NOISE = [RectifiedFlow(), ZERO_SNR]
WRITTEN_OUT = {  # the definitions, once more, from the papers
    "epsilon": lambda x0, noise, at: noise,
    "x0": lambda x0, noise, at: x0,
    "v": lambda x0, noise, at: (at.alpha * noise - at.sigma * x0) / (at.alpha**2 + at.sigma**2).sqrt(),
    "velocity": lambda x0, noise, at: at.d_alpha * x0 + at.d_sigma * noise,
}


def points(path, t):
    """The path at times t, x0 and noise there, and x_t."""
    generator = torch.Generator().manual_seed(0)
    x0, noise = torch.randn(2, len(t), 3, 4, 4, generator=generator, dtype=torch.float64)
    at = PathPoint(*(predictions.spread(value, x0) for value in path(t)))
    return at, x0, noise, at.alpha * x0 + at.sigma * noise


@pytest.mark.parametrize("path", PATHS, ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_there_and_back(kind, path):
    at, x0, noise, x_t = points(path, torch.linspace(1e-4, 1 - 1e-4, 401, dtype=torch.float64))
    said = predictions.target(kind, x0, noise, at)
    torch.testing.assert_close(said, WRITTEN_OUT[kind](x0, noise, at).expand_as(said))
    found = predictions.to_x0(kind, said, x_t, at)
    torch.testing.assert_close(found, x0, rtol=1e-8, atol=1e-8)
    torch.testing.assert_close(predictions.to_noise(found, x_t, at), noise, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("path", PATHS, ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_both_ends_are_determined_or_the_two_are_refused(kind, path):
    at, x0, noise, x_t = points(path, torch.tensor([0.0, 1.0], dtype=torch.float64))
    if kind == "epsilon" and path in ENDS_IN_NOISE:
        with pytest.raises(
            ConfigError, match="prediction=epsilon does not determine x0 .*.prediction=x0 or v or veloc"
        ):
            predictions.check(kind, path)
    else:
        predictions.check(kind, path)
        found = predictions.to_x0(kind, predictions.target(kind, x0, noise, at), x_t, at)
        torch.testing.assert_close(found, x0, rtol=1e-8, atol=1e-8)


def test_v_of_edm_is_minus_the_papers_network():
    """D(x) = c_skip x + c_out F(c_in x) with sigma_data = 1 (Karras et al. 2022, equation 7 and table 1)."""
    at, x0, noise, x_t = points(EDM(), torch.linspace(0, 1, 50, dtype=torch.float64))
    c_skip, c_out = 1 / (at.sigma**2 + 1), at.sigma / (at.sigma**2 + 1).sqrt()
    network = torch.randn(x0.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    torch.testing.assert_close(predictions.to_x0("v", -network, x_t, at), c_skip * x_t + c_out * network)


def test_what_is_not_determined_is_refused_by_name():
    at, x0, noise, x_t = points(RectifiedFlow(), torch.tensor([0.0, 0.5], dtype=torch.float64))
    with pytest.raises(ValueError, match="x0 does not determine epsilon where sigma is 0"):
        predictions.to_noise(x0, x_t, at)
    with pytest.raises(ConfigError, match="one of epsilon, x0, v, velocity, not 'eps'"):
        predictions.check("eps", RectifiedFlow())


@pytest.mark.parametrize("path", PATHS, ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_the_error_weight_is_that_of_the_conversion(kind, path):
    t = torch.linspace(0.05, 0.95, 19, dtype=torch.float64)
    at, x0, noise, x_t = points(path, t)
    error = torch.randn(x0.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    moved = predictions.to_x0(kind, predictions.target(kind, x0, noise, at) + error, x_t, at) - x0
    weight = predictions.x0_error_weight(kind, path(t))
    torch.testing.assert_close(error.square().flatten(1).sum(1), weight * moved.square().flatten(1).sum(1))
