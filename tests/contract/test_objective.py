"""Conformance: every objective of configs/, and every combination of parts that a config can name."""

import functools
from itertools import product
from pathlib import Path

import pytest
import torch
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf

from sdtrain.build import build
from sdtrain.contracts import PathPoint
from sdtrain.diffusion import prediction as predictions
from sdtrain.diffusion import timestep, weighting
from sdtrain.diffusion.path import EDM, RectifiedFlow, VariancePreserving
from sdtrain.diffusion.prediction import KINDS, spread
from sdtrain.errors import ConfigError
from sdtrain.objective.denoising import Denoising
from sdtrain.ops.random import Draw
from sdtrain.target import check_node, parts

CONFIGS = Path(__file__).parents[2] / "configs"
NAMES = (path.stem for path in sorted((CONFIGS / "objective").glob("*.yaml")))
OBJECTIVES = [name for name in NAMES if not name.startswith(("autoencoding", "decoded"))]  # stage 1's, and an extra

PATHS = [
    RectifiedFlow(),
    EDM(),
    *(VariancePreserving(s, zero_terminal_snr=zero) for s in ("scaled_linear", "linear", "cosine") for zero in (0, 1)),
]
DENSITIES = [
    timestep.Uniform(),
    timestep.Uniform(1000),
    timestep.LogitNormal(),
    timestep.LogitNormal(shift=3.0),
    timestep.LogNormal(),
]
DENSITIES += [timestep.LowDiscrepancy(density) for density in DENSITIES]
ON_X0 = [weighting.MinSNR(), weighting.SoftMinSNR(), weighting.P2(), weighting.EDM(), weighting.Sigmoid()]
WEIGHTINGS = [weighting.Unit(), *ON_X0]
DRAW = Draw.of(3, 64)
X0, NOISE = DRAW.normal("data", (2, 3, 3)), DRAW.normal("noise", (2, 3, 3))


def written_out(kind, x0, noise, at):
    """The definitions, once more, from the papers."""
    return {
        "epsilon": noise,
        "x0": x0,
        "v": (at.alpha * noise - at.sigma * x0) / (at.alpha**2 + at.sigma**2).sqrt(),
        "velocity": at.d_alpha * x0 + at.d_sigma * noise,
    }[kind]


def is_determined(kind, path):
    """Whether the prediction says what x0 is on the whole path: noise does not where there is nothing but noise."""
    return kind != "epsilon" or float(path(torch.tensor(1.0)).alpha) > 0


COMBINATIONS = [pytest.param(path, kind, id=f"{kind}-{path}") for path, kind in product(PATHS, KINDS)]


def spread_path(path, t):
    return PathPoint(*(spread(value, X0) for value in path(t)))


@pytest.mark.parametrize(("path", "kind"), COMBINATIONS)
def test_a_combination_has_no_loss_when_perfect_or_is_refused(path, kind):
    for density, weight in product(DENSITIES, WEIGHTINGS):
        if not is_determined(kind, path):
            with pytest.raises(ConfigError, match=f"objective.prediction={kind} does not determine x0"):
                Denoising(path, kind, density, weight)
            continue
        made = Denoising(path, kind, density, weight)
        t = density(DRAW, path)
        said = written_out(kind, X0, NOISE, spread_path(path, t))
        perfect = made.loss(lambda x, time, cond: said, X0, {}, DRAW)["loss"]  # noqa: B023
        silent = made.loss(lambda x, time, cond: torch.zeros_like(said), X0, {}, DRAW)["loss"]  # noqa: B023
        assert bool(silent.isfinite().all())
        assert bool((perfect <= 1e-11 * silent + 1e-20).all())
        expected = weight(kind, path(t)) * said.square().flatten(1).mean(1)
        torch.testing.assert_close(silent, expected)


@pytest.mark.parametrize("path", PATHS, ids=str)
def test_all_predictions_of_the_same_x0_have_the_same_loss(path):
    """Algebraic equivalence: an error of x0 counts the same, whatever the network says it by."""
    estimate = X0 + 0.3 * DRAW.normal("error", (2, 3, 3))

    def network(kind, x, time, cond):
        t = timestep.LogitNormal()(DRAW, path)
        at = spread_path(path, t)
        x_t = at.alpha * X0 + at.sigma * NOISE
        return written_out(kind, estimate, predictions.to_noise(estimate, x_t, at), at)

    kinds = [kind for kind in KINDS if is_determined(kind, path)]
    for weight in ON_X0:
        made = {kind: Denoising(path, kind, timestep.LogitNormal(), weight) for kind in kinds}
        losses = {kind: made[kind].loss(functools.partial(network, kind), X0, {}, DRAW)["loss"] for kind in kinds}
        for kind in kinds:
            torch.testing.assert_close(losses[kind], losses["x0"], rtol=2e-3, atol=1e-6)


@pytest.mark.parametrize(("path", "kind"), COMBINATIONS)
def test_conversions_go_there_and_back_at_every_time(path, kind):
    if not is_determined(kind, path):
        return
    made = Denoising(path, kind, timestep.Uniform(), weighting.Unit())
    t = torch.linspace(0, 1, 64, dtype=torch.float64)
    at = PathPoint(*(spread(value, X0) for value in path(t)))
    x0, noise = X0.double(), NOISE.double()
    x_t = at.alpha * x0 + at.sigma * noise
    found = made.to_x0(written_out(kind, x0, noise, at), x_t, t)
    torch.testing.assert_close(found, x0, rtol=1e-7, atol=1e-7)


@pytest.mark.parametrize("path", PATHS, ids=str)
def test_every_weight_is_finite_wherever_its_density_draws(path):
    draw = Draw.of(5, 4096)
    for density, weight, kind in product(DENSITIES, WEIGHTINGS, KINDS):
        found = weight(kind, path(density(draw, path)))
        assert bool((found.isfinite() & (found >= 0)).all()), (density, weight, kind)


@functools.cache
def composed(name):
    with initialize_config_dir(str(CONFIGS), version_base="1.3"):
        return compose(f"objective/{name}").objective


@pytest.fixture(params=OBJECTIVES)
def objective(request):
    node = composed(request.param)
    for path, inner in parts(OmegaConf.to_container(node), "objective"):
        check_node(path, inner)
    return build(node)


def doubled(output, made):
    """With -1 where the variance is said: beta-tilde, the true one."""
    return torch.cat((output, -torch.ones_like(output)), dim=1) if made.learned_variance else output


def test_there_are_objectives():
    assert {"epsilon", "v", "x0", "rectified_flow", "edm", "v_zero_snr", "epsilon_learned_variance"} <= set(OBJECTIVES)


def test_a_perfect_denoiser_has_no_loss(objective):
    t = objective.timestep(DRAW, objective.path)
    at = spread_path(objective.path, t)
    noise = NOISE + objective.offset_noise * DRAW.normal("offset_noise", (2, 1, 1))
    said = written_out(objective.prediction, X0, noise, at)

    def perfect(x, time, cond):
        assert torch.equal(time, objective.path.network_time(t))
        torch.testing.assert_close(x, spread(objective.path.input_scale(t), X0) * (at.alpha * X0 + at.sigma * noise))
        return doubled(said, objective)

    out = objective.loss(perfect, X0, {}, DRAW)
    assert out["loss"].shape == (64,)
    assert float(out["loss"].max()) < 1e-8
    torch.testing.assert_close(objective.to_x0(out["output"], out["x_t"], out["t"]), X0, rtol=1e-3, atol=1e-4)


def test_what_trains_is_what_samples(objective):
    """At a time of the loss, a sampler's call gives the network the same input and time, and x0 is the same."""
    seen = []

    def network(x, time, cond):
        seen.append((x, time))
        return doubled(0.5 * x, objective)

    out = objective.loss(network, X0, {}, DRAW)
    x0 = objective.to_x0(out["output"], out["x_t"], out["t"])
    denoise = objective.x0_of(network)
    for i in range(0, 64, 9):
        found = denoise(out["x_t"][i : i + 1], float(out["t"][i]), {})
        assert torch.equal(seen[-1][1], seen[0][1][i : i + 1])
        torch.testing.assert_close(seen[-1][0], seen[0][0][i : i + 1])
        torch.testing.assert_close(found, x0[i : i + 1])


def test_a_samples_loss_does_not_depend_on_its_batch(objective):
    def network(x, time, cond):
        return doubled(x.sin(), objective)

    whole = objective.loss(network, X0, {}, DRAW)["loss"]
    part = objective.loss(network, X0[40:48], {}, Draw(3, torch.arange(40, 48), torch.zeros(8, dtype=torch.int64)))
    torch.testing.assert_close(part["loss"], whole[40:48])


def test_nothing_waits_for_the_device(objective):
    """A tensor on the meta device has no value that the host could ask for."""
    draw, x0 = Draw.of(3, 4, "meta"), torch.empty(4, 2, 3, 3, device="meta")

    def network(x, time, cond):
        return doubled(x, objective)

    out = objective.loss(network, x0, {}, draw)
    found = objective.x0_of(network, variance=objective.learned_variance)(x0, 0.5, {})
    made = (*out.values(), objective.to_x0(out["output"], x0, out["t"]), found)
    assert {(value.device.type, value.dtype) for value in made} == {("meta", torch.float32)}
