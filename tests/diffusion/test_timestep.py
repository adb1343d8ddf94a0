"""Densities of the training time."""

import math

import pytest
import torch

from sdtrain.diffusion.path import EDM, RectifiedFlow, VariancePreserving
from sdtrain.diffusion.timestep import LogitNormal, LogNormal, LowDiscrepancy, Uniform
from sdtrain.ops.random import Draw

DRAW, PATH = Draw.of(0, 40_000), RectifiedFlow()
NOISE = 5 * math.sqrt(0.25 / 40_000)


def test_uniform_is_even():
    t = Uniform()(DRAW, PATH)
    counts = torch.histc(t, 20, 0, 1)
    assert float(((counts - 2000).square() / 2000).sum()) < 19 + 5 * math.sqrt(2 * 19)
    assert ((t > 0) & (t < 1)).all()


@pytest.mark.parametrize("num_steps", [1000, 8])
def test_discrete_times_are_the_schedules_own_and_each_as_likely(num_steps, monkeypatch):
    steps = Uniform(num_steps)(DRAW, PATH) * (num_steps - 1)
    torch.testing.assert_close(steps, steps.round(), rtol=0, atol=1e-3)
    counts = torch.bincount(steps.round().long(), minlength=num_steps).double()
    expected = 40_000 / num_steps
    assert len(counts) == num_steps
    assert float(((counts - expected).square() / expected).sum()) < num_steps + 5 * math.sqrt(2 * num_steps)
    monkeypatch.setattr(Draw, "uniform", lambda *_: torch.tensor([1 - 2**-24]))
    assert Uniform(num_steps)(DRAW, PATH).tolist() == [1.0]


@pytest.mark.parametrize(("mean", "std", "shift"), [(0.0, 1.0, 1.0), (-0.6, 0.5, 1.0), (0.0, 1.0, 3.0)])
@pytest.mark.parametrize("wrapped", [lambda density: density, LowDiscrepancy], ids=["independent", "even"])
def test_logit_normal_has_its_quantiles(wrapped, mean, std, shift):
    t = wrapped(LogitNormal(mean, std, shift))(DRAW, PATH)
    for z, share in ((-1.0, 0.158655), (0.0, 0.5), (1.0, 0.841345)):
        unshifted = 1 / (1 + math.exp(-(mean + std * z)))
        quantile = shift * unshifted / (1 + (shift - 1) * unshifted)
        assert float((t < quantile).double().mean()) == pytest.approx(share, abs=NOISE)
    assert ((t > 0) & (t < 1)).all()


@pytest.mark.parametrize("path", [EDM(), RectifiedFlow(), VariancePreserving("cosine")], ids=str)
def test_log_normal_is_so_in_the_ratio_of_noise_to_data(path):
    t = LogNormal(-0.5, 1.2)(DRAW, path)
    at = path(t)
    ratio = (at.sigma / at.alpha).log()
    for z, share in ((-1.0, 0.158655), (0.0, 0.5), (1.0, 0.841345)):
        assert float((ratio < -0.5 + 1.2 * z).double().mean()) == pytest.approx(share, abs=NOISE)


def test_a_ratio_beyond_the_path_is_drawn_at_its_end():
    assert set(LogNormal(100.0, 1.0)(DRAW, EDM()).tolist()) == {1.0}
    assert set(LogNormal(-100.0, 1.0)(DRAW, EDM()).tolist()) == {0.0}


DENSITIES = [Uniform(), Uniform(1000), LogitNormal(shift=3.0), LogNormal(), LowDiscrepancy(LogitNormal())]


@pytest.mark.parametrize("density", DENSITIES, ids=str)
def test_a_samples_time_does_not_depend_on_its_batch(density):
    whole = density(DRAW, PATH)
    alone = density(Draw(0, torch.tensor([123]), torch.tensor([0])), PATH)
    assert torch.equal(whole[123:124], alone)
    other = density(Draw(1, torch.tensor([123]), torch.tensor([0])), PATH)
    assert not torch.equal(alone, other)


def discrepancy(t):
    """The largest difference between the share of times below a bound and the bound (Kolmogorov)."""
    n = len(t)
    return float((t.double().sort().values - (torch.arange(n) + 0.5) / n).abs().max()) + 0.5 / n


@pytest.mark.parametrize("num", [16, 100, 4096])
@pytest.mark.parametrize("first", [0, 7_000_000_019])
def test_low_discrepancy_is_even_over_samples_and_over_epochs(num, first):
    even, count = LowDiscrepancy(Uniform()), torch.arange(num)
    over_samples = even(Draw(3, first + count, torch.full((num,), 5)), PATH)
    over_epochs = even(Draw(3, torch.full((num,), first), count), PATH)
    independent = Uniform()(Draw(3, first + count, torch.full((num,), 5)), PATH)
    bound = (1 + math.log(num)) / num
    assert discrepancy(over_samples) < bound
    assert discrepancy(over_epochs) < bound
    assert discrepancy(independent) > bound
