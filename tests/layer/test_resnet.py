"""Residual blocks and resampling: the formulas by hand, channels-last in and out."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from sdtrain.layer.resnet import Downsample, ResnetBlock, Upsample

CHANNELS_LAST = {"memory_format": torch.channels_last}


@pytest.fixture
def x():
    return torch.randn(2, 8, 6, 4, generator=torch.Generator().manual_seed(0)).contiguous(**CHANNELS_LAST)


@pytest.mark.parametrize("out_channels", [8, 12])
@pytest.mark.parametrize("temb_width", [None, 5])
def test_a_block_is_its_formula(x, out_channels, temb_width):
    torch.manual_seed(0)
    block = ResnetBlock(8, out_channels, time_embed_dim=temb_width, groups=4, eps=1e-3)
    temb = None if temb_width is None else torch.randn(2, 5)
    h = F.silu(F.group_norm(x, 4, block.norm1.weight, block.norm1.bias, 1e-3))
    h = F.conv2d(h, block.conv1.weight, block.conv1.bias, padding=1)
    if temb is not None:
        h = h + (temb @ block.time_emb_proj.weight.T + block.time_emb_proj.bias)[:, :, None, None]
    h = F.silu(F.group_norm(h, 4, block.norm2.weight, block.norm2.bias, 1e-3))
    h = F.conv2d(h, block.conv2.weight, block.conv2.bias, padding=1)
    has_shortcut = hasattr(block, "conv_shortcut")
    assert has_shortcut == (out_channels != 8)
    past = F.conv2d(x, block.conv_shortcut.weight, block.conv_shortcut.bias) if has_shortcut else x
    torch.testing.assert_close(block(x, temb), past + h, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("out_channels", [8, 12, 64], ids=["same", "wider", "of patches"])
def test_every_answer_is_channels_last(x, dtype, out_channels):
    modules = [ResnetBlock(8, out_channels, time_embed_dim=5, groups=4), Downsample(8), Upsample(8)]
    with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
        answers = [modules[0](x, torch.randn(2, 5)), *(module(x) for module in modules[1:])]
        answers.append(Downsample(8, asymmetric=True)(x))
    for y in answers:
        assert y.is_contiguous(**CHANNELS_LAST)
        assert not y.is_contiguous()


def test_a_block_that_starts_at_zero_is_the_identity_and_can_learn(x):
    block = ResnetBlock(8, 8, time_embed_dim=5, groups=4, zero_init=True)
    y = block(x, torch.randn(2, 5))
    assert torch.equal(y, x)
    y.square().sum().backward()
    assert float(block.conv2.weight.grad.norm()) > 0


def test_dropout_works_in_training_alone(x):
    torch.manual_seed(0)
    block = ResnetBlock(8, 8, groups=4, dropout=0.5)
    assert not torch.equal(block(x), block(x))
    block.eval()
    assert torch.equal(block(x), block(x))


def test_halving_pads_on_both_sides_or_at_the_end_alone(x):
    for asymmetric, padding in ((False, (1, 1, 1, 1)), (True, (0, 1, 0, 1))):
        layer = Downsample(8, asymmetric)
        expected = F.conv2d(F.pad(x, padding), layer.conv.weight, layer.conv.bias, stride=2)
        torch.testing.assert_close(layer(x), expected)
        assert layer(x).shape == (2, 8, 3, 2)


@pytest.mark.parametrize("size", [None, (11, 7)])
def test_doubling_repeats_each_position(x, size):
    layer = Upsample(8)
    nn.init.dirac_(layer.conv.weight)  # so that the convolution does nothing
    nn.init.zeros_(layer.conv.bias)
    y = layer(x, size)
    expected = x.repeat_interleave(2, 2).repeat_interleave(2, 3)
    torch.testing.assert_close(y, expected if size is None else expected[:, :, :11, :7])
