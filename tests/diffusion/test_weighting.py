"""Weights of the loss: what they mean for x0, and that no time makes them infinite."""

import pytest
import torch

from sdtrain.diffusion.path import RectifiedFlow, VariancePreserving
from sdtrain.diffusion.prediction import KINDS, spread, target, to_x0
from sdtrain.diffusion.weighting import MinSNR, Unit

PATHS = [RectifiedFlow(), VariancePreserving(), VariancePreserving("cosine")]
TIMES = torch.cat((torch.linspace(0, 1, 1001), torch.tensor([1e-30, 1e-12, 1e-6, 1 - 1e-7])))


@pytest.mark.parametrize("path", PATHS, ids=str)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("weighting", [Unit(), MinSNR(), MinSNR(gamma=1.0)], ids=str)
def test_weights_are_finite_everywhere(weighting, kind, path):
    weight = weighting(kind, path(TIMES))
    assert weight.shape == TIMES.shape
    assert weight.isfinite().all()
    assert (weight >= 0).all()


@pytest.mark.parametrize("path", PATHS, ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_min_snr_weighs_the_error_of_x0_by_the_clamped_ratio(kind, path):
    t = torch.linspace(0.03, 0.97, 48, dtype=torch.float64)
    at = path(t)
    x0, noise, error = torch.randn(3, 48, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    point = type(at)(*(spread(value, x0) for value in at))
    said = target(kind, x0, noise, point) + error
    x0_error = (to_x0(kind, said, point.alpha * x0 + point.sigma * noise, point) - x0).square().sum(1)
    expected = ((at.alpha / at.sigma) ** 2).clamp(max=5.0) * x0_error
    torch.testing.assert_close(MinSNR(5.0)(kind, at) * error.square().sum(1), expected)


def test_min_snr_with_epsilon_is_one_where_there_is_only_noise():
    assert MinSNR(5.0)("epsilon", RectifiedFlow()(torch.tensor([1.0]))).tolist() == [1.0]


def test_unit_counts_every_time_alike():
    assert Unit()("v", PATHS[1](TIMES)).unique().tolist() == [1.0]
