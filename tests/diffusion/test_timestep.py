"""Densities of the training time."""

import math

import pytest
import torch

from sdtrain.diffusion.path import EDM, RectifiedFlow, VariancePreserving
from sdtrain.diffusion.timestep import LogitNormal, LogNormal, LowDiscrepancy, Uniform
from sdtrain.errors import ConfigError
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


def gap(t):
    """The largest gap between neighbours on the circle, in units of the mean one."""
    t = t.double().sort().values
    return float((torch.cat((t[1:], t[:1] + 1)) - t).max()) * len(t)


def discrepancy(t):
    """The largest difference between the share of times below a bound and the bound (Kolmogorov; the star
    discrepancy).
    """
    n = len(t)
    return float((t.double().sort().values - (torch.arange(n) + 0.5) / n).abs().max()) + 0.5 / n


@pytest.mark.parametrize("num", [64, 100, 4096])
@pytest.mark.parametrize("first", [0, 7_000_000_019])
def test_low_discrepancy_is_even_over_a_run_of_samples(num, first):
    """Whichever samples a step has: what counts is where they stand in the run's order."""
    count, sample_id, epoch = (
        torch.arange(num),
        Draw(1, torch.arange(num), torch.zeros(num).long()).bits("x"),
        num * [5],
    )
    draw = Draw(3, sample_id, torch.tensor(epoch), first + count)
    even, independent = LowDiscrepancy(Uniform())(draw, PATH), Uniform()(draw, PATH)
    bound = (1 + math.log(num)) / num
    assert discrepancy(even) < bound < discrepancy(independent)
    assert gap(even) < 1.9 < gap(independent)
    shuffled = torch.randperm(num, generator=torch.Generator().manual_seed(0))
    other = Draw(3, sample_id[shuffled], draw.epoch, draw.place[shuffled])
    assert torch.equal(LowDiscrepancy(Uniform())(other, PATH), even[shuffled])
    assert not torch.equal(LowDiscrepancy(Uniform())(Draw(4, sample_id, draw.epoch, draw.place), PATH), even)


def test_without_a_place_sample_and_epoch_stand_in_for_it():
    even, count = LowDiscrepancy(Uniform()), torch.arange(100)
    for draw in (Draw(3, 7 + count, count * 0 + 5), Draw(3, count * 0 + 7, count)):
        assert gap(even(draw, PATH)) < 1.9
        assert discrepancy(even(draw, PATH)) < (1 + math.log(100)) / 100


@pytest.mark.parametrize("density", [Uniform(), Uniform(1000), LogitNormal(-0.6, 0.5, 3.0), LogNormal()], ids=str)
def test_the_mean_over_a_batch_is_nearer_to_the_densitys(density):
    """What it is for: a step's loss varies less by chance of its times."""
    size, num = 64, 200
    place, zeros = torch.arange(size * num), torch.zeros(size * num).long()
    sample_id = Draw(1, place, zeros).bits("x")
    means = [
        d(Draw(2, sample_id, zeros, place), PATH).double().square().reshape(num, size).mean(1)
        for d in (density, LowDiscrepancy(density))
    ]
    assert float(means[1].var() / means[0].var()) < 0.1
    assert float(means[1].mean()) == pytest.approx(float(means[0].mean()), abs=4 * float(means[0].std()) / num**0.5)


def test_a_steps_times_in_a_run_are_even(train, small, whole, tmp_path, monkeypatch):
    """By the configuration's name, from the stream to the objective."""
    from sdtrain.objective.denoising import Denoising

    seen, loss = [], Denoising.loss

    def noted(*arguments):
        found = loss(*arguments)
        seen.append(torch.special.ndtr(found["t"].double().logit()))  # its quantile
        return found

    monkeypatch.setattr(Denoising, "loss", noted)
    options = ["stages=[diffusion]", f"first_stage.weights={whole}/autoencoder", "diffusion.trainer.batch_size=16"]
    options += ["diffusion.trainer.num_accumulate=2", "diffusion.trainer.max_steps=2"]
    base = [option for option in small if not option.startswith("objective")]
    train(tmp_path / "run", "objective=rectified_flow_even", *options, base=base)
    steps = [t for t in seen if len(t) == 8][:4]
    assert len(steps) == 4
    for step in (torch.cat(steps[:2]), torch.cat(steps[2:]), torch.cat(steps)):
        assert gap(step) < 1.9


def test_what_cannot_be_is_refused():
    for shift in (0.0, -1.0):
        with pytest.raises(ConfigError, match=f"timestep.shift={shift} must be above 0"):
            LogitNormal(shift=shift)
    for num_steps in (0, 1):
        with pytest.raises(ConfigError, match=f"timestep.num_steps={num_steps} must be at least 2"):
            Uniform(num_steps)
