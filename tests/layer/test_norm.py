"""Group normalisation: torch's own numbers, channels-last in and out."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from sdtrain.layer.norm import GroupNorm


@pytest.fixture
def pair():
    torch.manual_seed(0)
    theirs = nn.GroupNorm(4, 16, eps=1e-3)
    nn.init.normal_(theirs.weight)
    nn.init.normal_(theirs.bias)
    ours = GroupNorm(4, 16, eps=1e-3)
    ours.load_state_dict(theirs.state_dict())
    return ours, theirs


def test_it_is_torchs(pair):
    ours, theirs = pair
    x = (torch.randn(3, 16, 5, 6) * 7 + 3).requires_grad_()
    y = x.detach().clone().requires_grad_()
    direction = torch.randn(3, 16, 5, 6)
    (ours(x.contiguous(memory_format=torch.channels_last)) * direction).sum().backward()
    (theirs(y) * direction).sum().backward()
    torch.testing.assert_close(ours(x), theirs(y))
    torch.testing.assert_close(x.grad, y.grad, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(ours.weight.grad, theirs.weight.grad, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_it_stays_channels_last(pair, device, dtype):
    if device == "cuda" and not torch.cuda.is_available():
        pytest.skip("no GPU here")
    x = torch.randn(2, 16, 8, 8, device=device, dtype=dtype).contiguous(memory_format=torch.channels_last)
    with torch.autocast(device, torch.bfloat16):
        y = pair[0].to(device)(x)
    assert y.is_contiguous(memory_format=torch.channels_last)
    assert not y.is_contiguous()


def test_it_is_channels_last_whatever_torch_answers(pair, monkeypatch):
    """As `F.group_norm` on CUDA answers in NCHW."""
    theirs = F.group_norm
    monkeypatch.setattr(F, "group_norm", lambda *args: theirs(*args).contiguous())
    x = torch.randn(2, 16, 8, 8).contiguous(memory_format=torch.channels_last)
    assert pair[0](x).is_contiguous(memory_format=torch.channels_last)


def test_an_input_that_needs_no_gradient_does_not_crash_the_backward(pair):
    """With torch 2.13.0 on a CPU `F.group_norm` alone segfaults here, where adapters and frozen trunks come by."""
    ours, theirs = pair
    x = torch.randn(2, 16, 8, 8)
    ours(x.contiguous(memory_format=torch.channels_last)).square().sum().backward()
    theirs(x).square().sum().backward()
    torch.testing.assert_close(ours.weight.grad, theirs.weight.grad)
    with torch.no_grad():
        assert not ours(x.contiguous(memory_format=torch.channels_last)).requires_grad


def test_bfloat16_is_normalised_in_float32(pair):
    ours, theirs = pair
    x = (torch.randn(2, 16, 8, 8) + 30).bfloat16()
    torch.testing.assert_close(ours(x), theirs(x.float()).bfloat16())
