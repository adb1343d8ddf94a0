"""The loss on decoded pictures, with a decoder that can be written down."""

import pytest
import torch
from torch import nn

from sdtrain.contracts import PathPoint
from sdtrain.diffusion.path import RectifiedFlow
from sdtrain.objective.decoded import Decoded


class Doubling(nn.Module):
    """Decodes by a weight, after undoing a whitening of (z - 1) * 4."""

    def __init__(self):
        super().__init__()
        self.gain = nn.Parameter(torch.tensor(2.0))

    def unwhiten(self, latent):
        return latent / 4 + 1

    def decode(self, latent):
        return self.gain * latent


X0 = torch.randn(3, 3, 4, 4, generator=torch.Generator().manual_seed(0))
ERROR = torch.tensor([0.8, -0.4, 1.2]).view(3, 1, 1, 1)
AT = RectifiedFlow()(torch.tensor([0.0, 0.5, 0.9]))


def test_the_loss_is_the_definition():
    found = Decoded(weight=0.1)(Doubling(), X0 + ERROR, X0, AT)
    distances = torch.tensor([0.8, 0.4, 1.2]) / 4 * 2
    known = torch.tensor([1.0, 0.5, 0.01 / 0.82])  # alpha^2 / (alpha^2 + sigma^2)
    torch.testing.assert_close(found, 0.1 * (known * distances).mean())
    assert Decoded(weight=0.1)(Doubling(), X0, X0, AT).item() == 0


def test_gradients_reach_the_prediction_alone():
    first_stage = Doubling().requires_grad_(False)
    predicted, x0 = (X0 + ERROR).requires_grad_(), X0.clone().requires_grad_()
    Decoded(weight=1.0)(first_stage, predicted, x0, AT).backward()
    per_sample = predicted.grad.flatten(1).abs().sum(1)
    assert (per_sample > 0).all()
    assert float(per_sample[2]) < float(per_sample[1]) < float(per_sample[0])  # less where there is more noise
    assert x0.grad is None
    assert first_stage.gain.grad is None


def test_a_step_along_its_gradient_nears_the_picture():
    predicted = (X0 + ERROR).requires_grad_()
    decoded = Decoded(weight=1.0)
    loss = decoded(Doubling(), predicted, X0, AT)
    loss.backward()
    assert float(decoded(Doubling(), predicted.detach() - predicted.grad, X0, AT)) < float(loss)


def test_a_perceptual_distance_takes_the_pictures_place():
    met = []

    class Distance(nn.Module):
        def forward(self, picture, real):
            met.append((picture, real))
            return torch.tensor([1.0, 2.0, 4.0])

    even = PathPoint(*(torch.full((3,), v) for v in (0.6, 0.8, 0.0, 0.0)))
    found = Decoded(weight=0.5, perceptual=Distance())(Doubling(), X0 + ERROR, X0, even)
    assert float(found) == pytest.approx(0.5 * 0.36 * 7 / 3)
    torch.testing.assert_close(met[0][1], 2 * (X0 / 4 + 1))
