"""Convolutions as products: torch's own numbers and gradients, whichever way they are computed."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from sdtrain.layer.conv import Conv1x1, Conv3x3, _fold, _patches, _PatchProduct


def twins(kind, *sizes, **theirs_alone):
    torch.manual_seed(0)
    ours, theirs = kind(*sizes), nn.Conv2d(*sizes, **theirs_alone)
    ours.load_state_dict(theirs.state_dict())
    return ours.to(memory_format=torch.channels_last), theirs


def compare(ours, theirs, x, apply, rtol=1e-5, atol=1e-5):
    """Values and all gradients; ours stays channels-last."""
    mine, other = (x.clone().requires_grad_() for _ in range(2))
    found, expected = apply(ours, mine.contiguous(memory_format=torch.channels_last)), theirs(other)
    assert found.is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(found.float(), expected, rtol=rtol, atol=atol)
    direction = torch.randn(expected.shape)
    (found * direction).sum().backward()
    (expected * direction).sum().backward()
    for a, b in ((mine, other), (ours.weight, theirs.weight), (ours.bias, theirs.bias)):
        assert float((a.grad - b.grad).norm()) <= 10 * rtol * float(b.grad.norm())
    assert ours.weight.grad.stride() == ours.weight.stride()


@pytest.mark.parametrize("size", [(2, 3), (1, 1), (5, 4)], ids=["small", "a point", "large"])
def test_3x3_is_torchs(size, monkeypatch):
    ours, theirs = twins(Conv3x3, 6, 16, kernel_size=3, padding=1)
    calls, product = [], _PatchProduct.apply
    monkeypatch.setattr(_PatchProduct, "apply", lambda *given: calls.append(given) or product(*given))
    compare(ours, theirs, torch.randn(2, 6, *size), lambda conv, x: conv(x))
    assert len(calls) == (2 * size[0] * size[1] <= 16)


def test_3x3_sums_patches_of_bfloat16_in_float32():
    ours, theirs = twins(Conv3x3, 6, 32, kernel_size=3, padding=1)
    with torch.autocast("cpu", torch.bfloat16):
        assert ours(torch.randn(2, 6, 3, 3)).dtype == torch.bfloat16
    patches = torch.full((1, 1, 9, 9), 1.0, dtype=torch.bfloat16)
    patches[0, 0, :, 4] = 256.0  # 256 + 1 is 256 in bfloat16, but 256 + 2 is not
    assert _fold(patches)[0, 0, 4, 0] == 258.0

    def autocast(conv, x):
        with torch.autocast("cpu", torch.bfloat16):
            return conv(x)

    compare(ours, theirs, torch.randn(2, 6, 3, 3), autocast, rtol=2e-2, atol=2e-2)


def test_the_product_passes_the_numerical_check_of_gradients():
    shapes = ((2, 2, 3, 2), (4, 18), (4,))
    given = [torch.randn(shape, dtype=torch.float64, requires_grad=True) for shape in shapes]
    assert torch.autograd.gradcheck(_PatchProduct.apply, given)
    x = given[0].detach()
    expected = F.unfold(x.permute(0, 3, 1, 2), 3, padding=1).unflatten(1, (2, 9)).permute(0, 3, 2, 1)
    assert torch.equal(_patches(x), expected.reshape(2, 2, 3, 18))


def test_patches_are_not_kept_for_the_way_back():
    kept = []
    x, conv = torch.randn(2, 6, 3, 3).requires_grad_(), twins(Conv3x3, 6, 32, kernel_size=3, padding=1)[0]
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor) or tensor, lambda tensor: tensor):
        conv(x)
    assert sum(tensor.numel() for tensor in kept) == x.numel() + conv.weight.numel()


def test_what_is_frozen_or_at_the_start_has_no_gradient():
    x, conv = torch.randn(2, 6, 3, 3), twins(Conv3x3, 6, 32, kernel_size=3, padding=1)[0]
    conv(x).sum().backward()
    expected, conv.weight.grad = conv.weight.grad, None
    conv.requires_grad_(False)
    conv(x.requires_grad_()).sum().backward()
    assert expected is not None
    assert x.grad is not None
    assert conv.weight.grad is None


def test_1x1_is_torchs_over_the_last_dimension():
    ours, theirs = twins(Conv1x1, 6, 10, kernel_size=1)
    compare(ours, theirs, torch.randn(2, 6, 5, 4), Conv1x1.of_map)
    assert {name: p.shape for name, p in ours.state_dict().items()} == {
        name: p.shape for name, p in theirs.state_dict().items()
    }


def test_threads_change_no_bit_of_a_1x1():
    """Of oneDNN's convolution, they do on an AMD: latents made by two processes were others than those of one."""
    torch.manual_seed(0)
    conv, before = Conv1x1(8, 8), torch.get_num_threads()
    x = torch.randn(8, 8, 32, 32).contiguous(memory_format=torch.channels_last)
    found = []
    try:
        for num_threads in (1, 2, 3):
            torch.set_num_threads(num_threads)
            found.append(conv.of_map(x))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(found[0], other) for other in found[1:])
