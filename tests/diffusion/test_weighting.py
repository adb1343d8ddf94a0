"""Weights of the loss: what they mean for x0, and that no time makes them infinite."""

import math

import pytest
import torch

from sdtrain.diffusion.path import EDM as EDMPath
from sdtrain.diffusion.path import RectifiedFlow, VariancePreserving
from sdtrain.diffusion.prediction import KINDS, spread, target, to_x0
from sdtrain.diffusion.weighting import EDM, P2, MinSNR, Sigmoid, SoftMinSNR, Unit
from sdtrain.errors import ConfigError

ZERO_SNR = VariancePreserving(zero_terminal_snr=True)
PATHS = [RectifiedFlow(), VariancePreserving(), VariancePreserving("cosine"), ZERO_SNR, EDMPath()]
TIMES = torch.cat((torch.linspace(0, 1, 1001), torch.tensor([1e-30, 1e-12, 1e-6, 1 - 1e-7])))
ON_X0 = {  # on the error of x0, by SNR: once more, from the papers
    MinSNR(): lambda snr: snr.clamp(max=5.0),
    MinSNR(gamma=1.0): lambda snr: snr.clamp(max=1.0),
    SoftMinSNR(gamma=4.0): lambda snr: 1 / (1 / snr + 1 / 4.0),
    P2(): lambda snr: snr / (1 + snr),
    P2(k=2.0, gamma=0.5): lambda snr: snr / (2 + snr).sqrt(),
    EDM(): lambda snr: (1 / snr + 1) / (1 / snr),  # (sigma^2 + 1) / (sigma 1)^2 with sigma^2 = 1 / SNR
}


@pytest.mark.parametrize("path", PATHS, ids=str)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("weighting", [Unit(), Sigmoid(), Sigmoid(-3.0), *ON_X0], ids=str)
def test_weights_are_finite_everywhere(weighting, kind, path):
    weight = weighting(kind, path(TIMES))
    assert weight.shape == TIMES.shape
    assert weight.isfinite().all()
    assert (weight >= 0).all()


def errors(kind, path, t):
    """An error of the prediction at t and what it is in x0, squared."""
    at = path(t)
    x0, noise, error = torch.randn(3, len(t), 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    point = type(at)(*(spread(value, x0) for value in at))
    said = target(kind, x0, noise, point) + error
    found = to_x0(kind, said, point.alpha * x0 + point.sigma * noise, point)
    return error.square().sum(1), (found - x0).square().sum(1), at


@pytest.mark.parametrize("path", PATHS, ids=str)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("weighting", ON_X0, ids=str)
def test_a_weight_counts_the_error_of_x0_as_its_paper_says(weighting, kind, path):
    error, x0_error, at = errors(kind, path, torch.linspace(0.03, 0.97, 48, dtype=torch.float64))
    torch.testing.assert_close(weighting(kind, at) * error, ON_X0[weighting]((at.alpha / at.sigma) ** 2) * x0_error)


@pytest.mark.parametrize("kind", KINDS)
def test_sigmoid_is_the_bounds_own_weight_times_a_sigmoid_and_the_same_on_every_path(kind):
    log_snr, bias = torch.linspace(-4, 4, 200, dtype=torch.float64), -1.0
    for path in PATHS:
        t = path.time_of(torch.exp(-log_snr / 2)).requires_grad_()
        at = path(t)
        (slope,) = torch.autograd.grad((2 * (at.alpha / at.sigma).log()).sum(), t)
        error, x0_error, at = errors(kind, path, t.detach())
        on_epsilon = torch.sigmoid(bias - log_snr) * -slope
        torch.testing.assert_close(
            Sigmoid(bias)(kind, at) * error, on_epsilon * log_snr.exp() * x0_error, rtol=1e-5, atol=1e-8
        )


def test_known_values():
    noise_alone = ZERO_SNR(torch.tensor([1.0]))
    assert MinSNR(5.0)("epsilon", noise_alone).tolist() == pytest.approx([1.0])  # min(SNR, gamma) / SNR
    assert MinSNR(5.0)("v", noise_alone).tolist() == pytest.approx([0.0])
    assert MinSNR(5.0)("x0", RectifiedFlow()(torch.tensor([0.0]))).tolist() == [5.0]
    assert P2()("epsilon", VariancePreserving()(torch.rand(9))).max() <= 1
    for path in PATHS:
        torch.testing.assert_close(EDM()("v", path(TIMES)), torch.ones_like(TIMES), rtol=1e-5, atol=0)
    soft, hard = (w("epsilon", VariancePreserving()(TIMES)) for w in (SoftMinSNR(), MinSNR()))
    assert bool((soft <= hard * (1 + 1e-6)).all())
    assert bool((soft >= hard / 2 * (1 - 1e-6)).all())
    assert math.isclose(float(Unit()("v", PATHS[1](TIMES)).unique()), 1.0)


@pytest.mark.parametrize(("kind", "name"), [(MinSNR, "gamma"), (SoftMinSNR, "gamma"), (P2, "k")])
def test_a_weight_below_zero_is_refused(kind, name):
    for value in (0.0, -5.0):
        with pytest.raises(ConfigError, match=f"weighting.{name}={value} must be above 0"):
            kind(**{name: value})
