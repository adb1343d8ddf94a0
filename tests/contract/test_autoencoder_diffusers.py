"""The first stages beside diffusers' classes: the same names, numbers and gradients, strictly loaded both ways."""

import inspect
from pathlib import Path

import diffusers
import pytest
import torch
import yaml

from sdtrain.first_stage.autoencoder_kl import AutoencoderKL
from sdtrain.first_stage.vq import VQModel

CONFIGS = Path(__file__).resolve().parents[2] / "configs" / "first_stage"
SMALL = {"block_out_channels": [8, 16, 16], "layers_per_block": 2, "norm_num_groups": 4}
KL = {
    "sd": SMALL,
    "sd3": SMALL | {"use_quant_conv": False, "use_post_quant_conv": False, "latent_channels": 16},
    "one quant": SMALL | {"use_post_quant_conv": False},
    "other quant": SMALL | {"use_quant_conv": False, "latent_channels": 6},
    "no attention": SMALL | {"mid_block_add_attention": False, "layers_per_block": 1},
    "other pictures": SMALL | {"in_channels": 1, "out_channels": 2, "block_out_channels": [8, 24]},
}
VQ = {
    "ldm": SMALL | {"num_vq_embeddings": 32},
    "no attention": SMALL | {"mid_block_add_attention": False, "num_vq_embeddings": 7, "layers_per_block": 1},
    "embedding": SMALL | {"vq_embed_dim": 5, "latent_channels": 4, "num_vq_embeddings": 64},
    "other pictures": SMALL | {"in_channels": 1, "out_channels": 2, "num_vq_embeddings": 16},
}


def blocks(config):
    num = len(config["block_out_channels"])
    return {"down_block_types": ["DownEncoderBlock2D"] * num, "up_block_types": ["UpDecoderBlock2D"] * num}


def twins(kind, config, **ours_alone):
    """Ours and theirs with the same weights, loaded strictly each way."""
    torch.manual_seed(0)
    theirs, ours = getattr(diffusers, kind.__name__)(**config, **blocks(config)), kind(**config, **ours_alone)
    ours.load_state_dict(theirs.state_dict())
    theirs.load_state_dict(ours.state_dict())
    return ours, theirs


def assert_same_gradients(ours, theirs):
    """Relative to its norm; a key's bias has no gradient but rounding, as softmax forgets it."""
    named = dict(theirs.named_parameters())
    for name, p in ours.named_parameters():
        assert float((p.grad - named[name].grad).norm()) <= 1e-4 * float(named[name].grad.norm()) + 2e-5, name


def pictures(config):
    generator = torch.Generator().manual_seed(1)
    image = torch.rand(2, config.get("in_channels", 3), 32, 24, generator=generator) * 2 - 1
    direction = torch.randn(2, config.get("out_channels", 3), 32, 24, generator=generator)
    return image, direction


@pytest.mark.parametrize("checkpointing", [False, True], ids=["kept", "recomputed"])
@pytest.mark.parametrize("config", KL.values(), ids=KL)
def test_autoencoder_kl(config, checkpointing):
    ours, theirs = twins(AutoencoderKL, config, gradient_checkpointing=checkpointing)
    image, direction = pictures(config)
    posterior, other = ours.encode(image), theirs.encode(image).latent_dist
    noise = torch.randn(posterior.mean.shape, generator=torch.Generator().manual_seed(2))
    found = ours.decode(posterior.mean + posterior.std * noise)
    expected = theirs.decode(other.mean + other.std * noise).sample
    for a, b in ((posterior.mean, other.mean), (posterior.std, other.std), (found, expected)):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)
    (found * direction).sum().backward()
    (expected * direction).sum().backward()
    assert_same_gradients(ours, theirs)


@pytest.mark.parametrize("checkpointing", [False, True], ids=["kept", "recomputed"])
@pytest.mark.parametrize("config", VQ.values(), ids=VQ)
def test_vq_model(config, checkpointing):
    ours, theirs = twins(VQModel, config, gradient_checkpointing=checkpointing)
    image, direction = pictures(config)
    with torch.no_grad():  # codes among the latents, or all positions would choose the same
        latents = theirs.encode(image).latents.permute(0, 2, 3, 1).flatten(0, 2)
        for network in (ours, theirs):
            codes = network.quantize.embedding.weight
            codes.copy_(latents[:: len(latents) // len(codes)][: len(codes)] + 0.01)
    latent, expected_latent = ours.encode(image).mean, theirs.encode(image).latents
    torch.testing.assert_close(latent, expected_latent, rtol=1e-5, atol=1e-5)
    quantised = ours.quantize(latent)
    indices = theirs.quantize(expected_latent)[2][2]
    assert torch.equal(quantised.index.flatten(), indices)
    assert len(indices.unique()) > 4
    found, expected = ours.decode_codes(quantised.latent), theirs.decode(expected_latent)
    torch.testing.assert_close(found, expected.sample, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(ours.decode(latent), expected.sample, rtol=1e-5, atol=1e-5)
    penalty = 0.25 * quantised.codebook + quantised.commitment  # as latent diffusion weighs them
    torch.testing.assert_close(penalty, expected.commit_loss, rtol=1e-5, atol=1e-5)
    ((found * direction).sum() + 100 * penalty).backward()
    ((expected.sample * direction).sum() + 100 * expected.commit_loss).backward()
    assert_same_gradients(ours, theirs)


WIDE = {"block_out_channels": [128, 256, 512, 512], "layers_per_block": 2, "norm_num_groups": 32, "act_fn": "silu"}
PLAIN = {"use_quant_conv": False, "use_post_quant_conv": False, "latents_mean": None, "latents_std": None}
# The content of published config.json files, as far as it differs from the defaults.
PUBLISHED = {
    "SD 1.5": ("autoencoder_kl", WIDE | {"sample_size": 512, "_diffusers_version": "0.6.0"}, 83_653_863),
    "SD 2.1": ("autoencoder_kl", WIDE | {"sample_size": 768, "scaling_factor": 0.18215}, 83_653_863),
    "SDXL": ("autoencoder_kl", WIDE | {"sample_size": 1024, "scaling_factor": 0.13025}, 83_653_863),
    "SD3": (
        "autoencoder_kl_16ch",
        WIDE | PLAIN | {"latent_channels": 16, "scaling_factor": 1.5305, "shift_factor": 0.0609},
        83_819_683,
    ),
    "Flux": (
        "autoencoder_kl_16ch",
        WIDE | PLAIN | {"latent_channels": 16, "scaling_factor": 0.3611, "shift_factor": 0.1159},
        83_819_683,
    ),
    "vq-f4": (
        "vq",
        {"block_out_channels": [128, 256, 512], "layers_per_block": 2, "num_vq_embeddings": 8192, "sample_size": 256},
        55_322_782,
    ),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_at_full_size_names_and_shapes_are_the_published_ones(name):
    file, config, num_parameters = PUBLISHED[name]
    kind = VQModel if name == "vq-f4" else AutoencoderKL
    values = yaml.safe_load((CONFIGS / f"{file}.yaml").read_text())
    configured = {key: value for key, value in values.items() if key not in ("_target_", "weights")}
    with torch.device("meta"):
        ours = kind(**configured)
        imported = kind.from_diffusers(config | blocks(config) | {"_class_name": kind.__name__})
        theirs = getattr(diffusers, kind.__name__)(
            **{key: value for key, value in config.items() if not key.startswith("_")}, **blocks(config)
        )
    shapes = {name: tuple(p.shape) for name, p in theirs.state_dict().items()}
    for network in (ours, imported):
        assert {name: tuple(p.shape) for name, p in network.state_dict().items()} == shapes
    found = sum(p.numel() for p in ours.parameters())
    print(f"{name}: {found:,} parameters")
    assert found == num_parameters
    assert ours.down_factor == (4 if name == "vq-f4" else 8)


@pytest.mark.parametrize("kind", [AutoencoderKL, VQModel])
def test_defaults_are_those_of_diffusers(kind):
    ours, theirs = (inspect.signature(k).parameters for k in (kind, getattr(diffusers, kind.__name__)))
    assert ours.keys() - theirs.keys() == {"gradient_checkpointing"}
    for name in ours.keys() & theirs.keys():
        assert ours[name].default == theirs[name].default, name
    kind.from_diffusers({name: parameter.default for name, parameter in theirs.items()})  # all that it knows
