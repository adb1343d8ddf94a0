"""Attention by hand and by torch's own call; the transformer starts as the identity."""

import pytest
import torch
from torch.nn import functional as F

from sdtrain.layer.attention import Attention, SpatialTransformer, TransformerBlock, attend, plain_attention


def inputs(length, others, dtype=torch.float64):
    generator = torch.Generator().manual_seed(0)
    shapes = ((2, 3, length, 4), (2, 3, others, 4), (2, 3, others, 4))
    return [torch.randn(shape, generator=generator, dtype=dtype).requires_grad_() for shape in shapes]


MASK = torch.tensor([[True, True, False, True, False], [True, False, False, False, False]])[:, None, None, :]


@pytest.mark.parametrize("mask", [None, MASK, MASK.expand(2, 3, 7, 5)], ids=["all", "masked", "masked in full"])
def test_both_ways_are_the_definition(mask):
    q, k, v = inputs(7, 5)
    scores = torch.einsum("bhld,bhmd->bhlm", q, k) / 2.0
    if mask is not None:
        scores = scores.masked_fill(~mask, -1e30)
    expected = torch.einsum("bhlm,bhmd->bhld", torch.exp(scores) / torch.exp(scores).sum(-1, keepdim=True), v)
    wanted = torch.autograd.grad(expected.square().sum(), (q, k, v))
    for way in (plain_attention, F.scaled_dot_product_attention):
        attended = way(q, k, v, mask)
        torch.testing.assert_close(attended, expected)
        for found, gradient in zip(torch.autograd.grad(attended.square().sum(), (q, k, v)), wanted):
            torch.testing.assert_close(found, gradient)


def test_in_bfloat16_it_is_as_near_as_bfloat16_is():
    q, k, v = inputs(7, 5)
    found = attend(*(x.bfloat16() for x in (q, k, v)), MASK)
    assert found.dtype == torch.bfloat16
    torch.testing.assert_close(found.double(), plain_attention(q, k, v, MASK), rtol=2e-2, atol=2e-2)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_nothing_to_attend_to_is_not_nan(dtype):
    q, k, v = inputs(7, 5, dtype)
    attended = attend(q, k, v, torch.zeros(2, 1, 1, 5, dtype=torch.bool))
    attended.float().square().sum().backward()
    assert attended.isfinite().all()
    assert all(x.grad.isfinite().all() for x in (q, k, v))


def test_a_cpu_takes_plain_products_in_bfloat16_up_to_a_length(monkeypatch):
    calls = []
    monkeypatch.setattr(F, "scaled_dot_product_attention", lambda q, k, v, mask: calls.append(q.shape[2]) or v)
    attend(*inputs(512, 256, torch.bfloat16))
    attend(*inputs(513, 256, torch.bfloat16))
    attend(*inputs(2, 3, torch.float32))
    assert calls == [513, 2]


def test_a_masked_token_changes_nothing():
    torch.manual_seed(0)
    attention = Attention(8, num_heads=2, head_dim=4, cross_attention_dim=6)
    x, context = torch.randn(2, 3, 8), torch.randn(2, 5, 6)
    other = torch.where(MASK[:, 0, 0, :, None], context, torch.randn(2, 5, 6))
    assert torch.equal(attention(x, context, MASK[:, 0, 0]), attention(x, other, MASK[:, 0, 0]))
    assert not torch.allclose(attention(x, context), attention(x, other))


@pytest.mark.parametrize("linear", [False, True])
def test_a_new_transformer_is_the_identity_and_can_learn(linear):
    block = SpatialTransformer(8, num_heads=2, num_layers=1, cross_attention_dim=6, groups=4, linear_projection=linear)
    x = torch.randn(2, 8, 3, 5).contiguous(memory_format=torch.channels_last)
    y = block(x, torch.randn(2, 4, 6), None)
    assert torch.equal(x, y)
    assert y.is_contiguous(memory_format=torch.channels_last)
    y.square().sum().backward()
    assert float(block.proj_out.weight.grad.norm()) > 0


def test_positions_see_each_other_unless_there_is_cross_attention_only():
    torch.manual_seed(0)
    x, context = torch.randn(1, 3, 8), torch.randn(1, 5, 6)
    other = torch.cat((x[:, :2], torch.randn(1, 1, 8)), dim=1)
    for only in (False, True):
        block = TransformerBlock(8, num_heads=2, head_dim=4, cross_attention_dim=6, only_cross_attention=only)
        same = torch.allclose(block(x, context, None)[:, :2], block(other, context, None)[:, :2], atol=1e-6)
        assert same == only
