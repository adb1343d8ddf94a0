"""Stage 2's objective with a network that can be written down."""

import pytest
import torch

from sdtrain.contracts import PathPoint
from sdtrain.diffusion.path import RectifiedFlow, VariancePreserving
from sdtrain.diffusion.timestep import Uniform
from sdtrain.diffusion.weighting import MinSNR, Unit
from sdtrain.errors import ConfigError
from sdtrain.objective.denoising import Denoising
from sdtrain.ops.random import Draw

DRAW = Draw.of(5, 6)
X0 = Draw.of(6, 6).normal("data", (4, 5, 3))


def objective(prediction="velocity", path=None, weighting=None):
    return Denoising(path or RectifiedFlow(), prediction, Uniform(), weighting or Unit())


def test_the_loss_is_the_definition():
    seen = {}

    def network(x_t, time, cond):
        seen.update(x_t=x_t, time=time, cond=cond)
        return 0.5 * x_t

    cond = {"context": torch.zeros(6, 1, 1)}
    out = objective().loss(network, X0, cond, DRAW)
    t, noise = DRAW.uniform("timestep"), DRAW.normal("noise", (4, 5, 3))
    x_t = (1 - t).view(-1, 1, 1, 1) * X0 + t.view(-1, 1, 1, 1) * noise
    torch.testing.assert_close(seen["x_t"], x_t)
    torch.testing.assert_close(seen["time"], 1000 * t)
    assert seen["cond"] is cond
    torch.testing.assert_close(out["loss"], (0.5 * x_t - (noise - X0)).square().mean((1, 2, 3)))
    torch.testing.assert_close(out["t"], t)
    assert out["loss"].shape == (6,)


def test_each_sample_has_its_own_weight():
    path = VariancePreserving()
    plain, weighted = (
        objective("v", path, weighting).loss(lambda x, t, c: x, X0, {}, DRAW) for weighting in (Unit(), MinSNR())
    )
    torch.testing.assert_close(weighted["loss"], plain["loss"] * MinSNR()("v", path(plain["t"])))
    assert not torch.allclose(weighted["loss"], plain["loss"])


def test_a_samples_loss_does_not_depend_on_its_batch():
    whole = objective().loss(lambda x, t, c: x.square(), X0, {}, DRAW)["loss"]
    one = Draw(5, torch.tensor([4]), torch.tensor([0]))
    alone = objective().loss(lambda x, t, c: x.square(), X0[4:5], {}, one)["loss"]
    torch.testing.assert_close(whole[4:5], alone)


def test_the_error_is_measured_in_float32():
    out = objective().loss(lambda x, t, c: x.bfloat16(), X0, {}, DRAW)
    assert out["loss"].dtype == out["output"].dtype == torch.float32


@pytest.mark.parametrize("prediction", ["epsilon", "x0", "v", "velocity"])
def test_samplers_get_the_x0_that_the_output_means(prediction):
    made = objective(prediction, VariancePreserving())
    noise, t = torch.randn(6, 4, 5, 3), 0.3
    at = PathPoint(*(float(v) for v in made.path(torch.tensor(t))))
    said = {
        "epsilon": noise,
        "x0": X0,
        "v": at.alpha * noise - at.sigma * X0,
        "velocity": at.d_alpha * X0 + at.d_sigma * noise,
    }[prediction]

    def network(x_t, time, cond):
        torch.testing.assert_close(time, torch.full((6,), 0.3 * 999))
        assert cond == {"context": "this"}
        return said.to(torch.float32)

    x0 = made.x0_of(network)(at.alpha * X0 + at.sigma * noise, t, {"context": "this"})
    torch.testing.assert_close(x0, X0, rtol=1e-4, atol=1e-4)


def test_gradients_reach_the_network():
    weight = torch.ones((), requires_grad=True)
    objective().loss(lambda x, t, c: weight * x, X0, {}, DRAW)["loss"].mean().backward()
    assert float(weight.grad) != 0


def test_an_unknown_prediction_is_refused():
    with pytest.raises(ConfigError, match="one of epsilon, x0, v, velocity, not 'noise'"):
        objective("noise")
