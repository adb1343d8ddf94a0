"""The KL autoencoder: its start, its precision, its layout, its memory. Its numbers beside diffusers' stand in
tests/contract/test_autoencoder_diffusers.py.
"""

import pytest
import torch
from torch import nn

from sdtrain.first_stage.autoencoder_kl import AutoencoderKL
from sdtrain.layer.conv import Conv1x1

SMALL = {
    "block_out_channels": [8, 16, 16],
    "layers_per_block": 2,
    "latent_channels": 4,
    "norm_num_groups": 4,
}
CASES = {
    "sd": SMALL,
    "no attention": SMALL | {"mid_block_add_attention": False, "layers_per_block": 1},
    "no quant": SMALL | {"use_quant_conv": False, "use_post_quant_conv": False, "latent_channels": 6},
}


@pytest.mark.parametrize("config", CASES.values(), ids=CASES)
def test_latents_start_nearly_certain(config):
    torch.manual_seed(0)
    std = AutoencoderKL(**config).encode(torch.randn(2, 3, 32, 32)).std
    assert 0.02 < float(std.detach().mean()) < 0.1  # e^-3


def test_the_posterior_is_float32_and_bounded():
    ours = AutoencoderKL(**SMALL)
    nn.init.constant_(ours.quant_conv.bias[4:], 1e6)
    with torch.autocast("cpu", torch.bfloat16):
        posterior = ours.encode(torch.zeros(1, 3, 16, 16))
    assert posterior.mean.dtype == posterior.std.dtype == torch.float32
    torch.testing.assert_close(posterior.std.max(), torch.tensor(10.0).exp())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_every_convolution_meets_channels_last(dtype):
    network, met = AutoencoderKL(**SMALL), {}
    for name, module in network.named_modules():
        if isinstance(module, nn.Conv2d) and not isinstance(module, Conv1x1):  # whose channels stand last anyway
            assert module.weight.is_contiguous(memory_format=torch.channels_last)
            module.register_forward_hook(lambda m, xs, y, name=name: met.update({name: (xs[0], y)}))
    with torch.autocast("cpu", dtype, enabled=dtype == torch.bfloat16):
        made = network.decode(network.encode(torch.randn(2, 3, 16, 16)).mean)
    assert len(met) > 30
    for name, tensors in met.items():
        assert all(t.is_contiguous(memory_format=torch.channels_last) for t in tensors), name
    assert made.is_contiguous(memory_format=torch.channels_last)


def test_the_last_layer_is_the_decoders():
    network = AutoencoderKL(**SMALL)
    assert network.last_layer is network.decoder.conv_out


def test_checkpointing_keeps_one_tensor_a_block_and_nothing_when_nothing_is_learned():
    kept, x = {}, torch.randn(2, 3, 32, 32)
    for checkpointing in (False, True):
        torch.manual_seed(0)
        network, total = AutoencoderKL(**SMALL, gradient_checkpointing=checkpointing), 0

        def pack(tensor):
            nonlocal total
            total += tensor.numel() if tensor.dim() == 4 and tensor.shape[0] == 2 else 0
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            network.decode(network.encode(x).mean)
        kept[checkpointing] = total
        with torch.no_grad():
            assert network.decode(network.encode(x).mean).shape == x.shape
    assert kept[True] < 0.35 * kept[False]
