"""The sinusoidal embedding by its formula; the two layers behind it."""

import math

import pytest
import torch

from sdtrain.layer.embedding import TimestepEmbedding, sinusoidal


@pytest.mark.parametrize(("flip", "shift"), [(True, 0), (False, 0), (True, 1)])
def test_it_is_the_formula(flip, shift):
    times, dim = [0.0, 0.25, 17.0, 999.0], 8
    found = sinusoidal(torch.tensor(times), dim, flip_sin_to_cos=flip, freq_shift=shift)
    for row, time in zip(found, times):
        angles = [time * 10000.0 ** (-i / (dim / 2 - shift)) for i in range(dim // 2)]
        sin, cos = [math.sin(a) for a in angles], [math.cos(a) for a in angles]
        torch.testing.assert_close(row, torch.tensor(cos + sin if flip else sin + cos), rtol=1e-4, atol=1e-4)


def test_it_is_float32_whatever_the_times_are_and_fills_an_odd_width_with_zero():
    found = sinusoidal(torch.tensor([3, 999]), 5)
    assert found.shape == (2, 5)
    assert found.dtype == torch.float32
    assert not found[:, 4].any()


def test_times_are_told_apart():
    found = sinusoidal(torch.arange(1000.0), 32)
    distance = torch.cdist(found, found).fill_diagonal_(1.0)
    assert float(distance.min()) > 0.05


def test_the_network_behind_it():
    torch.manual_seed(0)
    network, x = TimestepEmbedding(6, 8), torch.randn(3, 6)
    hidden = x @ network.linear_1.weight.T + network.linear_1.bias
    expected = (hidden * hidden.sigmoid()) @ network.linear_2.weight.T + network.linear_2.bias
    torch.testing.assert_close(network(x), expected)
