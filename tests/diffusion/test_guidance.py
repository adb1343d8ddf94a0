"""Classifier-free guidance by hand."""

import pytest
import torch

from sdtrain.diffusion.guidance import classifier_free, stack

COND = {"context": torch.full((2, 1, 1), 3.0), "concat": torch.full((2, 1, 1, 1), 5.0)}
NULL = {"context": torch.full((2, 1, 1), 1.0), "concat": torch.full((2, 1, 1, 1), 5.0)}
X = torch.arange(2.0).view(2, 1, 1, 1)


@pytest.fixture
def network():
    """x0 = x + 10 t + context, and how large each of its batches was."""

    def x0_of(x, t, cond):
        assert cond["concat"].shape[0] == x.shape[0]
        x0_of.sizes.append(x.shape[0])
        return x + 10 * t + cond["context"][..., None]

    x0_of.sizes = []
    return x0_of


@pytest.mark.parametrize("scale", [0.0, 0.5, 3.0, 7.5])
def test_it_moves_from_null_past_conditional(network, scale):
    found = classifier_free(network, COND, NULL, scale)(X, 0.5)
    torch.testing.assert_close(found, X + 5 + 1 + scale * (3 - 1))
    assert network.sizes == [4]


def test_scale_one_is_the_conditional_prediction_and_costs_half(network):
    assert torch.equal(classifier_free(network, COND, NULL, 1.0)(X, 0.5), X + 5 + 3)
    assert network.sizes == [2]


def test_outside_of_the_interval_there_is_no_guidance(network):
    denoise = classifier_free(network, COND, NULL, 3.0, interval=(0.2, 0.6))
    for t, guided in ((0.1, False), (0.2, True), (0.6, True), (0.7, False)):
        torch.testing.assert_close(denoise(X, t), X + 10 * t + (1 + 3 * 2 if guided else 3))


def test_an_empty_conditioning_stays_empty():
    assert stack({}, {}) == {}
