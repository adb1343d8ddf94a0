"""Pixels as latents."""

import torch

from sdtrain.build import build
from sdtrain.config import load_config
from sdtrain.first_stage.identity import Identity


def test_everything_is_the_picture_itself():
    stage = Identity()
    image = torch.rand(2, 3, 8, 8) * 2 - 1
    posterior = stage.encode(image)
    assert torch.equal(posterior.mean, image)
    assert not posterior.std.any()
    assert torch.equal(stage.decode(stage.unwhiten(stage.whiten(image))), image)
    assert list(stage.parameters()) == []


def test_the_config_builds_it_and_the_models_input_follows():
    cfg = load_config(["first_stage=identity", "model=unet_tiny"])
    stage = build(cfg.first_stage)
    assert (stage.latent_channels, stage.down_factor) == (3, 1)
    assert cfg.model.in_channels == cfg.model.out_channels == 3
