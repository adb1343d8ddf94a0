"""What stage 2 is told of a first stage: statistics, and what the latent space is like where there are pictures."""

import pytest
import torch

from sdtrain.first_stage.autoencoder_kl import AutoencoderKL
from sdtrain.first_stage.manifest import Manifest
from sdtrain.stage.latents import latent_figures, measure_latents


class Data:
    """As the data modules answer a stage."""

    image_size = 8

    def __init__(self, images, encode=None):
        self.images, self.encode, self.splits = images, encode, {"train": len(images)}

    def load(self, split, ids, as_images=False):
        image = self.images[list(ids)]
        return {"image": image} if self.encode is None else {"latent": torch.stack(self.encode(image), dim=1).half()}


@pytest.fixture(scope="module")
def network():
    torch.manual_seed(0)
    return AutoencoderKL(
        block_out_channels=(8, 8), norm_num_groups=4, latent_channels=4, mid_block_add_attention=False
    ).requires_grad_(False)


def test_the_manifest_says_what_the_latent_space_is_like(network, tmp_path):
    colours = torch.rand(200, 3, 1, 1, generator=torch.Generator().manual_seed(0)) * 2 - 1
    images = colours.expand(200, 3, 8, 8)  # what any convolution keeps apart
    manifest = measure_latents(network, Data(images), num_images=150)
    assert manifest.num_images == manifest.latent_space["num_images"] == 150
    assert 0.2 < manifest.latent_space["neighbour_correlation"] < 1
    assert manifest.latent_space["channel_std"] == pytest.approx(manifest.latent_std, rel=1e-3)
    manifest.save(tmp_path / "manifest.json")
    assert Manifest.load(tmp_path / "manifest.json") == manifest
    figures = latent_figures(manifest)
    assert figures["neighbour_correlation"] == manifest.latent_space["neighbour_correlation"]
    assert figures["num_dead_channels"] == len(manifest.latent_space["dead_channels"])


def test_without_pictures_nothing_is_said_of_neighbours(network):
    images = torch.rand(20, 3, 8, 8, generator=torch.Generator().manual_seed(0)) * 2 - 1
    manifest = measure_latents(network, Data(images, network.encode))
    assert manifest.num_images == 20
    assert manifest.latent_space is None
    assert latent_figures(manifest)["neighbour_correlation"] is None
