"""The PatchGAN discriminator: its shape, its patch, and that no picture sees its batch."""

import pytest
import torch
from torch import nn

from sdtrain.layer.norm import GroupNorm
from sdtrain.model.discriminator import PatchDiscriminator


def test_at_the_papers_size_it_has_the_papers_layers():
    network = PatchDiscriminator()
    widths = [module.out_channels for module in network.layers if isinstance(module, nn.Conv2d)]
    assert widths == [64, 128, 256, 512, 1]  # C64-C128-C256-C512 (Isola et al. 2017, section 6.1.2)
    assert network(torch.zeros(1, 3, 64, 64)).shape == (1, 1, 6, 6)
    assert sum(p.numel() for p in network.parameters()) == 2_765_633


def test_it_grows_up_to_eight_times_its_width():
    network = PatchDiscriminator(in_channels=4, width=8, num_layers=5)
    widths = [module.out_channels for module in network.layers if isinstance(module, nn.Conv2d)]
    assert widths == [8, 16, 32, 64, 64, 64, 1]


def test_no_picture_sees_its_batch():
    torch.manual_seed(0)
    network = PatchDiscriminator(width=8, num_layers=2)
    x = torch.randn(3, 3, 32, 32)
    torch.testing.assert_close(network(x)[1:2], network(x[1:2]))
    assert not any(isinstance(module, nn.modules.batchnorm._BatchNorm) for module in network.modules())


@pytest.mark.parametrize(("num_layers", "patch"), [(1, 16), (2, 34), (3, 70)])
def test_a_logit_sees_a_patch_of_this_size(num_layers, patch):
    network = PatchDiscriminator(width=4, num_layers=num_layers, norm_num_groups=1)
    for i, module in enumerate(network.layers):  # a norm looks at the whole picture, which hides what convolutions see
        if isinstance(module, GroupNorm):
            network.layers[i] = nn.Identity()
        elif isinstance(module, nn.Conv2d):
            nn.init.constant_(module.weight, 0.1)
    x = torch.zeros(1, 3, 128, 128, requires_grad=True)
    logits = network(x)
    logits[0, 0, logits.shape[2] // 2, logits.shape[3] // 2].backward()
    seen = x.grad[0, 0] != 0
    assert seen.any(0).sum() == seen.any(1).sum() == patch


def test_it_is_channels_last_throughout():
    network = PatchDiscriminator(width=8, num_layers=2)
    met = []
    for module in network.layers:
        module.register_forward_hook(lambda m, xs, y: met.append(y))
    network(torch.randn(2, 3, 32, 32))
    assert network.layers[2].weight.is_contiguous(memory_format=torch.channels_last)
    assert all(y.is_contiguous(memory_format=torch.channels_last) for y in met)
