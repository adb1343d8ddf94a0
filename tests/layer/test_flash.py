"""Our attention kernels: no further from double precision than torch's, whatever the sizes and threads."""

import pytest
import torch
from torch.nn import functional as F

from sdtrain.layer import flash
from sdtrain.layer.attention import attend

SIZES = [
    (2, 3, 64, 64, 16),
    (1, 2, 512, 288, 48),
    (2, 1, 96, 32, 64),
    (1, 2, 32, 160, 160),
    (2, 2, 33, 77, 16),
    (1, 3, 95, 1, 32),
]

NAMES = {torch.bfloat16: "bf16", torch.float32: "f32"}


@pytest.fixture(params=NAMES, ids=NAMES.values())
def dtype(request):
    if not flash._is_here(NAMES[request.param]):
        pytest.skip("the processor, Linux or the C compiler lacks AMX or AVX-512")
    return request.param


def inputs(dtype, batch, heads, length, others, dim):
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


@pytest.mark.parametrize("sizes", SIZES)
@pytest.mark.parametrize("spread", [1.0, 4.0])
def test_the_answer_and_gradients_are_as_near_as_torchs(dtype, sizes, spread):
    given = inputs(dtype, *sizes)
    given[0].data *= spread  # of the scores
    direction = torch.randn_like(given[0])
    exact = [x.detach().double().requires_grad_() for x in given]
    wanted = answers(F.scaled_dot_product_attention, exact, direction.double())
    theirs = answers(F.scaled_dot_product_attention, given, direction)
    ours = answers(flash.flash_attention, given, direction)
    for found, other, right in zip(ours, theirs, wanted, strict=True):
        assert found.dtype == dtype
        times, bound, slack = {torch.bfloat16: (1.1, 6e-3, 1e-4), torch.float32: (2, 3e-6, 1e-7)}[dtype]
        assert (found - right).norm() <= times * (other - right).norm() + slack
        assert (found - right).norm() <= bound * right.norm() + 1e-4  # of one key, queries have no gradient


def test_large_scores_do_not_overflow(dtype):
    """Differences of a thousand between scores: the largest takes all."""
    given = inputs(dtype, 1, 2, 40, 300, 16)
    given[0].data *= 300
    y = flash.flash_attention(*given)
    exact = F.scaled_dot_product_attention(*(x.double() for x in given))
    assert (y - exact).abs().max() < {torch.bfloat16: 0.05, torch.float32: 1e-3}[dtype]


@pytest.mark.parametrize("score", [-200.0, 200.0])
def test_scores_all_far_from_zero_have_gradients(dtype, score):
    """What fills the last block of keys has a score of 0: far above -200."""
    given = inputs(dtype, 1, 2, 50, 77, 16)
    for x, shift in zip(given[:2], (score / 20, 5.0), strict=True):
        x.data.mul_(0.1).add_(shift)  # 16 products of score / 4, over 4
    direction = torch.randn_like(given[0])
    exact = [x.detach().double().requires_grad_() for x in given]
    wanted = gradients(F.scaled_dot_product_attention, exact, direction.double())
    for found, right in zip(gradients(flash.flash_attention, given, direction), wanted, strict=True):
        assert (found - right).norm() <= {torch.bfloat16: 0.2, torch.float32: 1e-3}[dtype] * right.norm()


def test_threads_change_no_bit(dtype):
    given, before = inputs(dtype, 3, 3, 64, 64, 32), torch.get_num_threads()
    found = []
    try:
        for num_threads in (1, 2, 5):
            torch.set_num_threads(num_threads)
            found.append(answers(flash.flash_attention, given, torch.ones_like(given[0])))
    finally:
        torch.set_num_threads(before)
    for other in found[1:]:
        assert all(map(torch.equal, found[0], other))


@pytest.mark.parametrize("length", [32, 41])
@pytest.mark.parametrize("which", ["q", "k", "v"])
def test_what_is_no_number_stays_none(dtype, which, length):
    """In the gradient of v there is no v: all others must have it."""
    given = inputs(dtype, 1, 2, length, length, 16)
    given["qkv".index(which)].data[0, 1, length - 1, 3] = torch.nan
    found = answers(flash.flash_attention, given, torch.ones_like(given[0]))
    assert [x.isnan().any().item() for x in found] == [True, True, True, which != "v"]
    assert not any(x[0, 0].isnan().any() for x in found)  # the other head


@pytest.mark.parametrize(("length", "others"), [(64, 64), (50, 77)])
def test_nothing_is_written_beyond_what_is_asked_for(dtype, length, others):
    """Two pictures of three: the third's gradients are zero."""
    given = inputs(dtype, 3, 2, length, others, 16)
    direction = torch.zeros_like(given[0])
    direction[:2] = 1
    assert all((x[2] == 0).all() and (x[:2] != 0).any() for x in gradients(flash.flash_attention, given, direction))


@pytest.mark.parametrize(("length", "others"), [(64, 64), (50, 77)])
def test_pictures_do_not_know_each_other(dtype, length, others):
    given = inputs(dtype, 3, 2, length, others, 16)
    direction = torch.randn_like(given[0])
    whole = answers(flash.flash_attention, given, direction)
    for i in range(3):
        own = [x.detach()[i : i + 1].requires_grad_() for x in given]
        for one, among in zip(answers(flash.flash_attention, own, direction[i : i + 1]), whole, strict=True):
            assert torch.equal(one[0], among[i])


@pytest.mark.parametrize(
    ("sizes", "fits"),
    [((1, 2, 512, 512, 16), True), ((1, 2, 512, 512, 40), False), ((1, 2, 17, 77, 64), True)],
)
def test_attention_takes_it_where_it_fits(dtype, sizes, fits):
    assert takes(inputs(dtype, *sizes)) == fits


def test_attention_takes_no_other_precision_and_no_two(dtype):
    q, k, v = inputs(torch.float16, 1, 2, 64, 64, 16)
    assert not takes([q, k, v])
    q, k, v = inputs(dtype, 1, 2, 64, 64, 16)
    assert not flash.fits(q, k, v.half())
    assert not flash.fits(q, k.double(), v)


def test_wide_heads_in_float32_are_torchs():
    assert not takes(inputs(torch.float32, 1, 2, 64, 64, 80))


def test_it_takes_no_mask_and_no_fewer_heads_than_threads(dtype):
    given, mask = inputs(dtype, 1, 1, 1024, 1024, 16), torch.ones(1, 1, 1, 1024, dtype=torch.bool)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        assert not takes(given)
        torch.set_num_threads(1)
        assert takes(given)
        assert not takes([*given, mask])
    finally:
        torch.set_num_threads(before)


def takes(given):
    return "_FlashAttention" in type(attend(*given).grad_fn).__name__


def test_without_kernels_it_is_torchs(monkeypatch):
    monkeypatch.setattr(flash, "library", lambda: None)
    flash._is_here.cache_clear()
    try:
        assert not flash.fits(*inputs(torch.bfloat16, 1, 2, 512, 512, 16))
    finally:
        flash._is_here.cache_clear()
