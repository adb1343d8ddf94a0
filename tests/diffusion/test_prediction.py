"""Every conversion between predictions, there and back, and what a perfect denoiser loses under every shipped
objective.
"""

from pathlib import Path

import pytest
import torch

from sdtrain.build import build
from sdtrain.config import load_config
from sdtrain.contracts import PathPoint
from sdtrain.diffusion import prediction as predictions
from sdtrain.diffusion.path import RectifiedFlow, VariancePreserving
from sdtrain.diffusion.prediction import KINDS
from sdtrain.errors import ConfigError
from sdtrain.ops.random import Draw

CONFIGS = Path(__file__).parents[2] / "configs" / "objective"
OBJECTIVES = sorted(
    path.stem for path in CONFIGS.glob("*.yaml") if not path.stem.startswith(("autoencoding", "decoded"))
)
PATHS = [RectifiedFlow(), VariancePreserving(), VariancePreserving("cosine")]
WRITTEN_OUT = {  # the definitions, once more, from the papers
    "epsilon": lambda x0, noise, at: noise,
    "x0": lambda x0, noise, at: x0,
    "v": lambda x0, noise, at: at.alpha * noise - at.sigma * x0,
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


@pytest.mark.parametrize("kind", ["x0", "v", "velocity"])
def test_all_but_epsilon_hold_at_both_ends(kind):
    at, x0, noise, x_t = points(RectifiedFlow(), torch.tensor([0.0, 1.0], dtype=torch.float64))
    torch.testing.assert_close(predictions.to_x0(kind, predictions.target(kind, x0, noise, at), x_t, at), x0)


def test_what_is_not_determined_is_refused_by_name():
    at, x0, noise, x_t = points(RectifiedFlow(), torch.tensor([0.5, 1.0], dtype=torch.float64))
    with pytest.raises(ValueError, match="epsilon does not determine x0 where alpha is 0"):
        predictions.to_x0("epsilon", noise, x_t, at)
    at, x0, noise, x_t = points(RectifiedFlow(), torch.tensor([0.0, 0.5], dtype=torch.float64))
    with pytest.raises(ValueError, match="sigma is 0"):
        predictions.to_noise(x0, x_t, at)
    with pytest.raises(ConfigError, match="one of epsilon, x0, v, velocity, not 'eps'"):
        predictions.check("eps")


@pytest.mark.parametrize("path", PATHS, ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_the_error_weight_is_that_of_the_conversion(kind, path):
    t = torch.linspace(0.05, 0.95, 19, dtype=torch.float64)
    at, x0, noise, x_t = points(path, t)
    error = torch.randn(x0.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    moved = predictions.to_x0(kind, predictions.target(kind, x0, noise, at) + error, x_t, at) - x0
    weight = predictions.x0_error_weight(kind, path(t)) * torch.ones_like(t)
    torch.testing.assert_close(error.square().flatten(1).sum(1), weight * moved.square().flatten(1).sum(1))


@pytest.fixture(params=OBJECTIVES)
def objective(request):
    return build(load_config([f"objective={request.param}"]).objective)


def test_there_are_objectives():
    assert {"epsilon", "v", "rectified_flow"} <= set(OBJECTIVES)


def test_a_perfect_denoiser_has_no_loss(objective):
    draw = Draw.of(3, 64)
    x0 = draw.normal("data", (4, 3, 3))
    noise = draw.normal("noise", (4, 3, 3))
    t = objective.timestep(draw)
    at = objective.at(t, x0)

    def perfect(x_t, time, cond):
        assert torch.equal(time, objective.path.network_time(t))
        torch.testing.assert_close(x_t, at.alpha * x0 + at.sigma * noise)
        return WRITTEN_OUT[objective.prediction](x0, noise, at)

    out = objective.loss(perfect, x0, {}, draw)
    assert out["loss"].shape == (64,)
    assert float(out["loss"].max()) < 1e-9
    torch.testing.assert_close(objective.to_x0(out["output"], out["x_t"], out["t"]), x0, rtol=1e-3, atol=1e-4)

    silent = objective.loss(lambda x_t, time, cond: torch.zeros_like(x_t), x0, {}, draw)["loss"]
    size = WRITTEN_OUT[objective.prediction](x0, noise, at).square().flatten(1).mean(1)
    torch.testing.assert_close(silent, size * objective.weighting(objective.prediction, objective.path(t)))
