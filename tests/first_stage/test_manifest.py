"""The stage contract: what it measures, and that nothing else passes."""

import dataclasses
import json
import math

import pytest
import torch

from sdtrain.errors import ConfigError
from sdtrain.first_stage.autoencoder_kl import AutoencoderKL
from sdtrain.first_stage.manifest import Manifest, measure, weight_hash


def autoencoder(latent_channels=4, widths=(8, 8)):
    return AutoencoderKL(
        block_out_channels=widths,
        norm_num_groups=4,
        latent_channels=latent_channels,
        mid_block_add_attention=False,
    )


@pytest.fixture(scope="module")
def stage():
    torch.manual_seed(0)
    network = autoencoder()
    with torch.no_grad():  # latents far from standard, each channel in its own way, and a posterior that counts
        network.quant_conv.weight.mul_(4)
        network.quant_conv.bias[:4] = torch.tensor([3.0, -1.0, 0.0, 10.0])
        network.quant_conv.bias[4:] = -1.0
    return network


@pytest.fixture(scope="module")
def posteriors(stage):
    images = torch.rand(256, 3, 8, 8, generator=torch.Generator().manual_seed(1)) * 2 - 1
    with torch.no_grad():
        return [torch.stack(stage.encode(part), dim=1) for part in images.split(60)]


@pytest.fixture
def manifest(stage, posteriors):
    return measure(stage, posteriors, image_size=8)


def test_whitened_latents_have_mean_zero_and_variance_one(stage, posteriors, manifest):
    manifest.apply(stage)
    mean, std = torch.cat(posteriors).unbind(1)
    z = stage.whiten(mean + std * torch.randn(mean.shape, generator=torch.Generator().manual_seed(2)))
    torch.testing.assert_close(z.mean((0, 2, 3)), torch.zeros(4), rtol=0, atol=0.05)
    torch.testing.assert_close(z.var((0, 2, 3)), torch.ones(4), rtol=0.05, atol=0)
    torch.testing.assert_close(stage.unwhiten(stage.whiten(mean)), mean, rtol=1e-4, atol=1e-4)
    assert (manifest.num_images, manifest.image_size, manifest.down_factor) == (256, 8, 2)


def test_statistics_do_not_depend_on_the_batches(stage, posteriors, manifest):
    again = measure(stage, torch.cat(posteriors).split(7), image_size=8)
    for name in ("latent_mean", "latent_std", "latent_mean_confidence", "latent_std_confidence"):
        assert getattr(again, name) == pytest.approx(getattr(manifest, name), rel=1e-6)


def test_the_confidence_is_that_of_a_mean_over_pictures(stage):
    """Pictures of one value each: 64 positions of a picture tell no more than one."""
    values = torch.randn(400, 4, 1, 1, generator=torch.Generator().manual_seed(3))
    flat = torch.stack((values.expand(-1, -1, 8, 8), torch.zeros(400, 4, 8, 8)), dim=1)
    found = measure(stage, [flat], image_size=16)
    assert found.latent_mean_confidence == pytest.approx([1.96 / math.sqrt(400)] * 4, rel=0.1)
    assert found.latent_std_confidence == pytest.approx([1.96 / math.sqrt(2 * 400)] * 4, rel=0.25)


def test_it_comes_back_from_its_file(manifest, tmp_path):
    path = tmp_path / "autoencoder" / "manifest.json"
    manifest.save(path)
    assert Manifest.load(path) == manifest
    assert [p.name for p in path.parent.iterdir()] == ["manifest.json"]


@pytest.mark.parametrize(
    ("field", "other"),
    [
        ("weight_hash", "0" * 64),
        ("down_factor", 8),
        ("latent_channels", 16),
        ("input_range", (0.0, 1.0)),
        ("colour_order", "BGR"),
        ("image_size", 512),
    ],
)
def test_another_first_stage_is_refused_by_its_field(manifest, field, other):
    manifest.require(dataclasses.replace(manifest, num_images=7))  # how it was measured is no difference
    with pytest.raises(ConfigError, match=f"another first stage: {field} is "):
        manifest.require(dataclasses.replace(manifest, **{field: other}))


@pytest.mark.parametrize(
    ("change", "field"),
    [
        ({"weight_hash": "0" * 64}, "weight_hash"),
        ({"down_factor": 8}, "down_factor"),
        ({"latent_channels": 3}, "latent_channels"),
    ],
)
def test_it_is_not_applied_to_a_module_it_does_not_describe(stage, manifest, change, field):
    with pytest.raises(ConfigError, match=f"another first stage: {field} "):
        dataclasses.replace(manifest, **change).apply(stage)


def test_one_changed_bit_is_another_hash():
    torch.manual_seed(0)
    network = autoencoder()
    before = weight_hash(network)
    assert weight_hash(network.to(memory_format=torch.contiguous_format)) == before  # however it is laid out
    bits = network.encoder.conv_in.weight.data.view(torch.int32)
    bits[0, 0, 0, 0] ^= 1
    assert weight_hash(network) != before
    bits[0, 0, 0, 0] ^= 1
    assert weight_hash(network) == before
    assert weight_hash(network.bfloat16()) != before


@pytest.mark.parametrize(
    ("text", "told"),
    [
        (None, "no stage manifest .*has stage 1 finished there"),
        ("{", "is no stage manifest"),
        ("[1, 2]", "is no stage manifest"),
        ('{"weight_hash": "x"}', "is no stage manifest"),
        ("whole with another key", "is no stage manifest: .*colour_depth"),
    ],
)
def test_a_file_that_is_none_is_refused_by_name(manifest, tmp_path, text, told):
    path = tmp_path / "manifest.json"
    if text and text.startswith("whole"):
        text = json.dumps(dataclasses.asdict(manifest) | {"colour_depth": 8})
    if text is not None:
        path.write_text(text)
    with pytest.raises(ConfigError, match=told) as refused:
        Manifest.load(path)
    assert str(path) in str(refused.value).splitlines()[0]


def test_without_quant_convolutions_the_whitening_is_one_number_as_an_export_can_say_it(posteriors):
    """A VAE whose channels cannot be folded away gets one shift and one scale, under which all latents are standard."""
    plain = AutoencoderKL(
        block_out_channels=(8, 8),
        norm_num_groups=4,
        latent_channels=4,
        mid_block_add_attention=False,
        use_quant_conv=False,
        use_post_quant_conv=False,
    )
    manifest = measure(plain, posteriors, image_size=8)
    assert len(set(manifest.latent_mean)) == len(set(manifest.latent_std)) == 1
    mean, std = torch.cat(posteriors).double().unbind(dim=1)
    assert manifest.latent_mean[0] == pytest.approx(float(mean.mean()))
    spread = (std.square() + (mean - mean.mean()).square()).mean().sqrt()
    assert manifest.latent_std[0] == pytest.approx(float(spread))
