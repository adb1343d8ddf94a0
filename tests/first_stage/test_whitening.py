"""Whitening: whose statistics, in which form, and folded into the weights."""

import pytest
import torch

from sdtrain.errors import ConfigError
from sdtrain.first_stage.autoencoder_kl import AutoencoderKL
from sdtrain.first_stage.vq import VQModel

SMALL = {"block_out_channels": [8, 8], "norm_num_groups": 4, "mid_block_add_attention": False}
MEAN, STD = torch.tensor([1.0, 0.0, -2.0, 0.5]), torch.tensor([0.5, 1.0, 2.0, 0.25])
IMAGE = torch.rand(2, 3, 16, 16, generator=torch.Generator().manual_seed(1)) * 2 - 1


def test_whitening_is_per_channel_and_has_its_inverse():
    network, z = AutoencoderKL(**SMALL), torch.randn(2, 4, 3, 3)
    assert torch.equal(network.whiten(z), z)
    network.shift, network.scale = MEAN.tolist(), (1 / STD).tolist()
    torch.testing.assert_close(network.whiten(z)[:, 2], (z[:, 2] + 2.0) * 0.5)
    torch.testing.assert_close(network.unwhiten(network.whiten(z)), z)
    assert not any("shift" in name or "scale" in name for name in network.state_dict())  # values of the manifest


@pytest.mark.parametrize(
    ("network", "form"),
    [
        (AutoencoderKL(**SMALL), "per channel"),
        (AutoencoderKL(**SMALL, use_quant_conv=False), "scalar"),
        (AutoencoderKL(**SMALL, use_post_quant_conv=False), "scalar"),
        (VQModel(**SMALL, latent_channels=4), "one scale"),
    ],
)
def test_statistics_take_the_form_that_an_export_can_say(network, form):
    shift, std = network.whitening(MEAN, STD)
    z = MEAN[:, None] + STD[:, None] * torch.tensor([-1.0, 1.0])  # (C, N), exactly of these statistics
    white = (z - shift[:, None]) / std[:, None]
    torch.testing.assert_close(white.square().mean(), torch.tensor(1.0))
    torch.testing.assert_close(white.mean(), torch.tensor(0.0), atol=1e-6, rtol=0)
    assert len(shift.unique()) == (1 if form == "scalar" else 4)
    assert len(std.unique()) == (4 if form == "per channel" else 1)


def whitened(network):
    """A first stage with weights that mean something and a whitening that is far from none."""
    network.shift, network.scale = MEAN.tolist(), (1 / STD).tolist()
    if isinstance(network, VQModel):
        network.scale = [0.7] * 4
        torch.nn.init.normal_(network.quantize.embedding.weight)
    return network.requires_grad_(False)


@pytest.mark.parametrize("kind", [AutoencoderKL, VQModel])
def test_a_folded_first_stages_own_latents_are_the_whitened_ones(kind):
    torch.manual_seed(0)
    plain = whitened(kind(**SMALL, latent_channels=4))
    folded = kind(**SMALL, latent_channels=4)
    folded.load_state_dict(plain.folded_state())
    posterior, other = plain.encode(IMAGE), folded.encode(IMAGE)
    torch.testing.assert_close(other.mean, plain.whiten(posterior.mean), rtol=1e-5, atol=1e-5)
    expected_std = posterior.std * torch.tensor(plain.scale)[:, None, None]
    torch.testing.assert_close(other.std, expected_std, rtol=1e-5, atol=1e-6)
    z = torch.randn(2, 4, 8, 8)
    torch.testing.assert_close(folded.decode(z), plain.decode(plain.unwhiten(z)), rtol=1e-5, atol=1e-5)
    if kind is VQModel:
        index = plain.quantize.nearest(plain.unwhiten(z))
        assert torch.equal(folded.quantize.nearest(z), index)
        assert len(index.unique()) > 20
    same = whitened(kind(**SMALL, latent_channels=4))
    same.shift, same.scale = [0.0] * 4, [1.0] * 4
    for name, tensor in same.folded_state().items():  # nothing to fold: bit-equal
        assert torch.equal(tensor, same.state_dict()[name])


@pytest.mark.parametrize("lacking", ["use_quant_conv", "use_post_quant_conv"])
def test_without_its_convolutions_nothing_is_folded(lacking):
    with pytest.raises(ConfigError, match="export it with a scaling_factor and a shift_factor"):
        AutoencoderKL(**SMALL, **{lacking: False}).folded_state()


CONFIG = SMALL | {"down_block_types": ("DownEncoderBlock2D",) * 2, "up_block_types": ["UpDecoderBlock2D"] * 2}


PER_CHANNEL = {"scaling_factor": 0.5, "latents_mean": [1, 2, 3, 4], "latents_std": [1, 2, 4, 8]}


@pytest.mark.parametrize(
    ("stated", "shift", "scale"),
    [
        ({}, [0.0] * 4, [0.18215] * 4),
        ({"scaling_factor": 1.5305, "shift_factor": 0.0609}, [0.0609] * 4, [1.5305] * 4),
        ({"scaling_factor": 0.5, "shift_factor": None, "latents_mean": None}, [0.0] * 4, [0.5] * 4),
        (PER_CHANNEL, [1, 2, 3, 4], [0.5, 0.25, 0.125, 0.0625]),
    ],
)
def test_an_imported_first_stage_keeps_its_own_scale(stated, shift, scale):
    network = AutoencoderKL.from_diffusers(CONFIG | stated | {"_class_name": "AutoencoderKL", "sample_size": 512})
    assert (network.shift, network.scale) == (shift, scale)


@pytest.mark.parametrize(
    ("kind", "change", "message"),
    [
        (AutoencoderKL, {"act_fn": "mish"}, "act_fn is 'mish' there; only 'silu' is built here"),
        (AutoencoderKL, {"down_block_types": ["AttnDownEncoderBlock2D"] * 2}, "down_block_types is"),
        (AutoencoderKL, {"up_block_types": ["UpDecoderBlock2D"]}, "up_block_types is"),
        (AutoencoderKL, {"latent_chanels": 4}, "unknown key 'latent_chanels'; did you mean 'latent_channels'"),
        (AutoencoderKL, {"_class_name": "AutoencoderTiny"}, "of a AutoencoderTiny, not of a AutoencoderKL"),
        (AutoencoderKL, {"gradient_checkpointing": True}, "unknown key 'gradient_checkpointing'"),
        (VQModel, {"norm_type": "spatial"}, "norm_type is 'spatial' there; only 'group'"),
        (VQModel, {"lookup_from_codebook": True}, "lookup_from_codebook is True"),
        (VQModel, {"use_quant_conv": False}, "unknown key 'use_quant_conv'"),
    ],
)
def test_what_is_not_built_is_refused_by_name(kind, change, message):
    kind.from_diffusers(CONFIG)
    with pytest.raises(ConfigError, match=message):
        kind.from_diffusers(CONFIG | change)
