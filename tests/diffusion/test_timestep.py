"""Densities of the training time."""

import math

import pytest
import torch

from sdtrain.diffusion.timestep import LogitNormal, Uniform
from sdtrain.ops.random import Draw

DRAW = Draw.of(0, 40_000)


def test_uniform_is_even():
    t = Uniform()(DRAW)
    counts = torch.histc(t, 20, 0, 1)
    assert float(((counts - 2000).square() / 2000).sum()) < 19 + 5 * math.sqrt(2 * 19)
    assert ((t > 0) & (t < 1)).all()


@pytest.mark.parametrize("num_steps", [1000, 8])
def test_discrete_times_are_the_schedules_own_and_each_as_likely(num_steps, monkeypatch):
    steps = Uniform(num_steps)(DRAW) * (num_steps - 1)
    torch.testing.assert_close(steps, steps.round(), rtol=0, atol=1e-3)
    counts = torch.bincount(steps.round().long(), minlength=num_steps).double()
    expected = 40_000 / num_steps
    assert len(counts) == num_steps
    assert float(((counts - expected).square() / expected).sum()) < num_steps + 5 * math.sqrt(2 * num_steps)
    monkeypatch.setattr(Draw, "uniform", lambda *_: torch.tensor([1 - 2**-24]))
    assert Uniform(num_steps)(DRAW).tolist() == [1.0]


@pytest.mark.parametrize(("mean", "std", "shift"), [(0.0, 1.0, 1.0), (-0.6, 0.5, 1.0), (0.0, 1.0, 3.0)])
def test_logit_normal_has_its_quantiles(mean, std, shift):
    t = LogitNormal(mean, std, shift)(DRAW)
    for z, share in ((-1.0, 0.158655), (0.0, 0.5), (1.0, 0.841345)):
        unshifted = 1 / (1 + math.exp(-(mean + std * z)))
        quantile = shift * unshifted / (1 + (shift - 1) * unshifted)
        assert float((t < quantile).double().mean()) == pytest.approx(share, abs=5 * math.sqrt(0.25 / 40_000))
    assert ((t > 0) & (t < 1)).all()


@pytest.mark.parametrize("density", [Uniform(), Uniform(1000), LogitNormal(shift=3.0)], ids=str)
def test_a_samples_time_does_not_depend_on_its_batch(density):
    whole = density(DRAW)
    alone = density(Draw(0, torch.tensor([123]), torch.tensor([0])))
    assert torch.equal(whole[123:124], alone)
