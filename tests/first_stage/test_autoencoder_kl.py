"""The KL autoencoder beside diffusers' AutoencoderKL: the same names, the same numbers, the same gradients."""

import pytest
import torch
from diffusers import AutoencoderKL as Theirs
from torch import nn

from sdtrain.first_stage.autoencoder_kl import AutoencoderKL

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


def blocks(config):
    num = len(config["block_out_channels"])
    return {"down_block_types": ["DownEncoderBlock2D"] * num, "up_block_types": ["UpDecoderBlock2D"] * num}


def twins(config):
    """Ours and theirs with the same weights, loaded strictly each way."""
    torch.manual_seed(0)
    theirs, ours = Theirs(**config, **blocks(config)), AutoencoderKL(**config)
    ours.load_state_dict(theirs.state_dict())
    theirs.load_state_dict(ours.state_dict())
    return ours, theirs


def near(found, expected, share):
    """Relative to its norm; a key's bias has no gradient but rounding, as softmax forgets it."""
    return float((found - expected).norm()) <= share * float(expected.norm()) + 1e-5


@pytest.mark.parametrize("config", CASES.values(), ids=CASES)
def test_numbers_and_gradients_are_those_of_diffusers(config):
    ours, theirs = twins(config)
    generator = torch.Generator().manual_seed(1)
    image = torch.rand(2, 3, 32, 24, generator=generator) * 2 - 1
    direction, noise = torch.randn(image.shape, generator=generator), torch.randn(2, 1, 8, 6, generator=generator)

    posterior = ours.encode(image)
    found = ours.decode(posterior.mean + posterior.std * noise)
    other = theirs.encode(image).latent_dist
    expected = theirs.decode(other.mean + other.std * noise).sample
    for a, b in ((posterior.mean, other.mean), (posterior.std, other.std), (found, expected)):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)
    (found * direction).sum().backward()
    (expected * direction).sum().backward()
    named = dict(theirs.named_parameters())
    for name, p in ours.named_parameters():
        assert near(p.grad, named[name].grad, 1e-4), name


def test_at_full_size_it_is_stable_diffusions():
    config = {"block_out_channels": [128, 256, 512, 512], "layers_per_block": 2}
    with torch.device("meta"):
        ours, theirs = AutoencoderKL(**config), Theirs(**config, **blocks(config))
    shapes = {name: tuple(p.shape) for name, p in ours.state_dict().items()}
    assert shapes == {name: tuple(p.shape) for name, p in theirs.state_dict().items()}
    assert sum(p.numel() for p in ours.parameters()) == 83_653_863
    assert ours.down_factor == 8


@pytest.mark.parametrize("config", CASES.values(), ids=CASES)
def test_latents_start_nearly_certain(config):
    torch.manual_seed(0)
    std = AutoencoderKL(**config).encode(torch.randn(2, 3, 32, 32)).std
    assert 0.02 < float(std.detach().mean()) < 0.1  # e^-3


def test_the_posterior_is_float32_and_bounded():
    ours, _ = twins(SMALL)
    nn.init.constant_(ours.quant_conv.bias[4:], 1e6)
    with torch.autocast("cpu", torch.bfloat16):
        posterior = ours.encode(torch.zeros(1, 3, 16, 16))
    assert posterior.mean.dtype == posterior.std.dtype == torch.float32
    torch.testing.assert_close(posterior.std.max(), torch.tensor(10.0).exp())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_every_convolution_meets_channels_last(dtype):
    network, met = AutoencoderKL(**SMALL), {}
    for name, module in network.named_modules():
        if isinstance(module, nn.Conv2d):
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


def test_whitening_is_per_channel_and_has_its_inverse():
    network = AutoencoderKL(**SMALL)
    z = torch.randn(2, 4, 3, 3)
    assert torch.equal(network.whiten(z), z)
    network.shift, network.scale = [1.0, 0.0, -2.0, 0.5], [2.0, 1.0, 0.5, 4.0]
    torch.testing.assert_close(network.whiten(z)[:, 2], (z[:, 2] + 2.0) * 0.5)
    torch.testing.assert_close(network.unwhiten(network.whiten(z)), z)
    assert not any("shift" in name or "scale" in name for name in network.state_dict())  # values of the manifest
