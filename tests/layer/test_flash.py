"""Attention in matrix tiles: no further from double precision than torch's, whatever the sizes and threads."""

import pytest
import torch
from torch.nn import functional as F

from sdtrain.layer import flash
from sdtrain.layer.attention import attend
from sdtrain.layer.kernels import library

SIZES = [
    (2, 3, 64, 64, 16),
    (1, 2, 512, 288, 48),
    (2, 1, 96, 32, 64),
    (1, 2, 32, 160, 160),
    (2, 2, 33, 77, 16),
    (1, 3, 95, 1, 32),
]

needs_tiles = pytest.mark.skipif(
    library() is None or not library().flash_is_here(), reason="the processor, Linux or the C compiler lacks AMX"
)


def inputs(batch, heads, length, others, dim, dtype=torch.bfloat16):
    """As the network gives them: heads stand inside positions."""
    generator = torch.Generator().manual_seed(0)
    shapes = [(batch, n, heads, dim) for n in (length, others, others)]
    made = [torch.randn(shape, generator=generator).to(dtype).transpose(1, 2) for shape in shapes]
    return [x.requires_grad_() for x in made]


def gradients(way, given, direction):
    return torch.autograd.grad(way(*given), given, direction)


def answers(way, given, direction):
    y = way(*given)
    return [y, *torch.autograd.grad(y, given, direction)]


@needs_tiles
@pytest.mark.parametrize("sizes", SIZES)
@pytest.mark.parametrize("spread", [1.0, 4.0])
def test_the_answer_and_gradients_are_as_near_as_torchs(sizes, spread):
    given = inputs(*sizes)
    given[0].data *= spread  # of the scores
    direction = torch.randn_like(given[0])
    exact = [x.detach().double().requires_grad_() for x in given]
    wanted = answers(F.scaled_dot_product_attention, exact, direction.double())
    theirs = answers(F.scaled_dot_product_attention, given, direction)
    ours = answers(flash.flash_attention, given, direction)
    for found, other, right in zip(ours, theirs, wanted, strict=True):
        assert found.dtype == torch.bfloat16
        assert (found - right).norm() <= 1.1 * (other - right).norm() + 1e-4
        assert (found - right).norm() <= 6e-3 * right.norm() + 1e-4  # of one key, queries have no gradient


@needs_tiles
def test_large_scores_do_not_overflow():
    """Differences of a thousand between scores: the largest takes all."""
    given = inputs(1, 2, 40, 50, 16)
    given[0].data *= 300
    y = flash.flash_attention(*given)
    exact = F.scaled_dot_product_attention(*(x.double() for x in given))
    assert (y - exact).abs().max() < 0.05


@needs_tiles
def test_threads_change_no_bit():
    given, before = inputs(3, 3, 64, 64, 32), torch.get_num_threads()
    found = []
    try:
        for num_threads in (1, 2, 5):
            torch.set_num_threads(num_threads)
            found.append(answers(flash.flash_attention, given, torch.ones_like(given[0])))
    finally:
        torch.set_num_threads(before)
    for other in found[1:]:
        assert all(map(torch.equal, found[0], other))


@needs_tiles
@pytest.mark.parametrize("length", [32, 41])
@pytest.mark.parametrize("which", ["q", "k", "v"])
def test_what_is_no_number_stays_none(which, length):
    """In the gradient of v there is no v: all others must have it."""
    given = inputs(1, 2, length, length, 16)
    given["qkv".index(which)].data[0, 1, length - 1, 3] = torch.nan
    found = answers(flash.flash_attention, given, torch.ones_like(given[0]))
    assert [x.isnan().any().item() for x in found] == [True, True, True, which != "v"]
    assert not any(x[0, 0].isnan().any() for x in found)  # the other head


@needs_tiles
@pytest.mark.parametrize(("length", "others"), [(64, 64), (50, 77)])
def test_nothing_is_written_beyond_what_is_asked_for(length, others):
    """Two pictures of three: the third's gradients are zero."""
    given = inputs(3, 2, length, others, 16)
    direction = torch.zeros_like(given[0])
    direction[:2] = 1
    assert all((x[2] == 0).all() and (x[:2] != 0).any() for x in gradients(flash.flash_attention, given, direction))


@needs_tiles
@pytest.mark.parametrize(("length", "others"), [(64, 64), (50, 77)])
def test_pictures_do_not_know_each_other(length, others):
    given = inputs(3, 2, length, others, 16)
    direction = torch.randn_like(given[0])
    whole = answers(flash.flash_attention, given, direction)
    for i in range(3):
        own = [x.detach()[i : i + 1].requires_grad_() for x in given]
        for one, among in zip(answers(flash.flash_attention, own, direction[i : i + 1]), whole, strict=True):
            assert torch.equal(one[0], among[i])


@needs_tiles
@pytest.mark.parametrize(
    ("sizes", "dtype", "fits"),
    [
        ((1, 2, 512, 512, 16), torch.bfloat16, True),
        ((1, 2, 512, 512, 40), torch.bfloat16, False),
        ((1, 2, 17, 77, 16), torch.bfloat16, True),
        ((1, 2, 512, 512, 16), torch.float16, False),
        ((1, 2, 512, 512, 16), torch.float32, False),
    ],
)
def test_attention_takes_it_where_it_fits(sizes, dtype, fits):
    assert ("_FlashAttention" in type(attend(*inputs(*sizes, dtype)).grad_fn).__name__) == fits


@needs_tiles
def test_it_takes_no_mask_and_no_fewer_heads_than_threads():
    given, mask = inputs(1, 1, 1024, 1024, 16), torch.ones(1, 1, 1, 1024, dtype=torch.bool)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        assert "_FlashAttention" not in type(attend(*given).grad_fn).__name__
        torch.set_num_threads(1)
        assert "_FlashAttention" in type(attend(*given).grad_fn).__name__
        assert "_FlashAttention" not in type(attend(*given, mask).grad_fn).__name__
    finally:
        torch.set_num_threads(before)


def test_without_kernels_it_is_torchs(monkeypatch):
    monkeypatch.setattr(flash, "library", lambda: None)
    flash._has_tiles.cache_clear()
    try:
        assert not flash.fits(inputs(1, 2, 512, 512, 16)[0])
    finally:
        flash._has_tiles.cache_clear()
