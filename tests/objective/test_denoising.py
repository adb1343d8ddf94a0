"""Stage 2's objective with a network that can be written down."""

import pytest
import torch

from sdtrain.contracts import PathPoint
from sdtrain.diffusion.path import EDM, RectifiedFlow, VariancePreserving
from sdtrain.diffusion.prediction import coefficients
from sdtrain.diffusion.timestep import Uniform
from sdtrain.diffusion.variance import variational_bound
from sdtrain.diffusion.weighting import MinSNR, Unit
from sdtrain.errors import ConfigError
from sdtrain.objective.denoising import Denoising
from sdtrain.ops.random import Draw

DRAW = Draw.of(5, 6)
X0 = Draw.of(6, 6).normal("data", (4, 5, 3))


def objective(prediction="velocity", path=None, weighting=None, **options):
    return Denoising(path or RectifiedFlow(), prediction, Uniform(), weighting or Unit(), **options)


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


def test_offset_noise_moves_each_channel_and_is_to_be_predicted():
    seen = {}

    def network(x_t, time, cond):
        seen.update(x_t=x_t)
        return torch.zeros_like(x_t)

    made = objective("epsilon", VariancePreserving(), offset_noise=0.3)
    out = made.loss(network, X0, {}, DRAW)
    noise = DRAW.normal("noise", (4, 5, 3)) + 0.3 * DRAW.normal("offset_noise", (4, 1, 1))
    torch.testing.assert_close(out["loss"], noise.square().mean((1, 2, 3)))
    at = made.path(out["t"])
    expected = at.alpha.view(-1, 1, 1, 1) * X0 + at.sigma.view(-1, 1, 1, 1) * noise
    torch.testing.assert_close(seen["x_t"], expected)


def test_input_perturbation_is_in_the_input_and_not_in_the_target():
    seen = {}

    def network(x_t, time, cond):
        seen.update(x_t=x_t)
        return torch.zeros_like(x_t)

    made = objective("epsilon", VariancePreserving(), input_perturbation=0.1)
    out = made.loss(network, X0, {}, DRAW)
    noise = DRAW.normal("noise", (4, 5, 3))
    torch.testing.assert_close(out["loss"], noise.square().mean((1, 2, 3)))
    mixed = noise + 0.1 * DRAW.normal("input_perturbation", (4, 5, 3))
    at = made.path(out["t"])
    expected = at.alpha.view(-1, 1, 1, 1) * X0 + at.sigma.view(-1, 1, 1, 1) * mixed
    torch.testing.assert_close(seen["x_t"], expected)


def test_the_networks_input_is_scaled_and_what_is_handed_on_is_not():
    seen = []
    made = objective("v", EDM())

    def network(x_t, time, cond):
        seen.append(x_t)
        return torch.zeros_like(x_t)

    out = made.loss(network, X0, {}, DRAW)
    sigma = made.path(out["t"]).sigma.view(-1, 1, 1, 1)
    torch.testing.assert_close(out["x_t"], X0 + sigma * DRAW.normal("noise", (4, 5, 3)))
    torch.testing.assert_close(seen[0], out["x_t"] / (1 + sigma**2).sqrt())
    t = float(out["t"][2])
    x0 = made.x0_of(network)(out["x_t"][2:3], t, {})
    torch.testing.assert_close(seen[1], seen[0][2:3])
    torch.testing.assert_close(x0, out["x_t"][2:3] / (1 + sigma[2] ** 2))  # c_skip x, as the network says 0


class TestLearnedVariance:
    """A network that says the prediction and the variance, each by a weight of its own."""

    def made(self, **options):
        return objective("epsilon", VariancePreserving("cosine"), learned_variance=True, **options)

    def network(self, mean=0.5, variance=0.3):
        return lambda x, time, cond: torch.cat((mean * x, variance * x), dim=1)

    def test_the_loss_is_the_hybrid_one(self):
        made = self.made()
        out = made.loss(self.network(), X0, {}, DRAW)
        plain = objective("epsilon", VariancePreserving("cosine")).loss(lambda x, t, c: 0.5 * x, X0, {}, DRAW)
        predicted = made.to_x0(out["output"], out["x_t"], out["t"])
        assert predicted.shape == X0.shape
        fraction = (0.3 * out["x_t"] + 1) / 2
        bound = variational_bound(made.path, out["t"], X0, predicted, fraction)
        torch.testing.assert_close(out["loss"], plain["loss"] + 0.001 * bound)

    def test_the_bound_moves_the_variance_and_not_the_mean(self):
        mean, variance = (torch.tensor(v, requires_grad=True) for v in (0.5, 0.3))
        self.made().loss(self.network(mean, variance), X0, {}, DRAW)["loss"].mean().backward()
        alone = torch.tensor(0.5, requires_grad=True)
        plain = objective("epsilon", VariancePreserving("cosine"))
        plain.loss(lambda x, t, c: alone * x, X0, {}, DRAW)["loss"].mean().backward()
        torch.testing.assert_close(mean.grad, alone.grad)
        assert float(variance.grad) != 0

    def test_samplers_get_the_fraction_when_they_ask_for_it(self):
        made, x = self.made(), DRAW.normal("x", (4, 5, 3))
        both = made.x0_of(self.network(), variance=True)(x, 0.4, {})
        assert torch.equal(both[:, :4], made.x0_of(self.network())(x, 0.4, {}))
        torch.testing.assert_close(both[:, 4:], (0.3 * x + 1) / 2)

    def test_what_does_not_fit_is_refused(self):
        with pytest.raises(ConfigError, match="needs a VariancePreserving path; RectifiedFlow has no steps"):
            objective("v", RectifiedFlow(), learned_variance=True)
        with pytest.raises(ConfigError, match="model.out_channels=4 must be 8"):
            self.made().loss(lambda x, t, c: x, X0, {}, DRAW)
        with pytest.raises(ConfigError, match="model.out_channels=8 must be 4"):
            objective().x0_of(self.network())(X0, 0.5, {})
        with pytest.raises(ConfigError, match="needs a run with objective.learned_variance=true"):
            objective().x0_of(self.network(), variance=True)


def test_what_cannot_be_is_refused():
    with pytest.raises(ConfigError, match="one of epsilon, x0, v, velocity, not 'noise'"):
        objective("noise")
    with pytest.raises(ConfigError, match="prediction=epsilon does not determine x0"):
        objective("epsilon", VariancePreserving(zero_terminal_snr=True))


@pytest.mark.parametrize("path", [VariancePreserving(), EDM(), VariancePreserving("cosine", zero_terminal_snr=False)])
@pytest.mark.parametrize("prediction", ["epsilon", "x0", "v"])
def test_x0_errors_compare_across_objectives(path, prediction):
    """The same guess of x0, said by each prediction on each path, has the error that straight lines find."""

    def guess(x_t, at):  # of what every path has: x_t / alpha and the ratio
        return 0.5 * (x_t / at.alpha) / (1 + (at.sigma / at.alpha) ** 2)

    def network(made):
        def say(x, time, cond):
            at = PathPoint(*(v.view(-1, 1, 1, 1) for v in made.path(made.path.time_of(ratio))))
            x_t = x / made.path.input_scale(made.path.time_of(ratio)).view(-1, 1, 1, 1)
            x0 = guess(x_t, at)
            c, d = coefficients(made.prediction, at)
            return c * x0 + d * (x_t - at.alpha * x0) / at.sigma

        return say

    ratio, noise = torch.tensor([0.06, 0.2, 0.7, 1.0, 3.0, 12.0]), DRAW.normal("any", X0.shape[1:])
    flow, other = objective("velocity"), objective(prediction, path)
    expected = flow.x0_error(network(flow), X0, noise, {}, ratio)
    torch.testing.assert_close(other.x0_error(network(other), X0, noise, {}, ratio), expected, rtol=2e-3, atol=1e-5)
    assert (expected.diff() != 0).all()


def test_a_ratio_beyond_the_path_is_taken_at_its_end():
    made = objective("v", VariancePreserving())
    ends = [made.x0_error(lambda x, t, c: x, X0, X0, {}, torch.full((6,), r)) for r in (14.7, 1000.0)]
    torch.testing.assert_close(*ends)
