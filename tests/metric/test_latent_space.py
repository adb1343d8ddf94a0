"""Figures on latents: neighbours that stay neighbours, channels that tell nothing; that the manifest carries them."""

import pytest
import torch

from sdtrain.first_stage.manifest import Manifest
from sdtrain.metric.latent_space import LatentSpace, rank_correlation


def pictures(num=200, side=8):
    generator = torch.Generator().manual_seed(0)
    return torch.rand(num, 3, 2, 2, generator=generator).repeat_interleave(side // 2, 2).repeat_interleave(side // 2, 3)


def figures(image, mean, std=0.0, **options):
    space = LatentSpace(**options)
    std = torch.as_tensor(std).expand(mean.shape) if not torch.is_tensor(std) else std
    for part in zip(image.split(64), mean.split(64), std.split(64)):
        space.add(part[0], torch.stack(part[1:], dim=1))
    return space.figures()


def test_rank_correlation():
    x = torch.tensor([1.0, 2.0, 3.0, 4.0])
    assert rank_correlation(x, x.exp()) == pytest.approx(1)
    assert rank_correlation(x, -x) == pytest.approx(-1)
    assert rank_correlation(x, torch.tensor([1.0, 2.0, 2.0, 3.0])) == pytest.approx(0.9486833)  # ties: scipy's figure
    assert rank_correlation(x, torch.ones(4)) is None


def test_neighbours_that_stay_and_that_do_not():
    image = pictures()
    latents = image[:, :, ::4, ::4]  # (N, 3, 2, 2)
    assert figures(image, latents)["neighbour_correlation"] > 0.999
    assert figures(image, -5 * latents + 3)["neighbour_correlation"] > 0.999  # scale and place are not looked at
    other = figures(image, latents.roll(7, dims=0))
    assert abs(other["neighbour_correlation"]) < 0.1
    assert other["num_pairs"] == 20_000
    assert other["num_images"] == 200
    again = figures(image, latents.roll(7, dims=0))
    assert again == other
    assert figures(image, latents.roll(7, dims=0), seed=1) != other


def test_a_channel_counts_by_its_own_deviation():
    """A loud channel of noise does not drown the three that tell the picture."""
    image = pictures()
    noise = 1000 * torch.rand(200, 1, 2, 2, generator=torch.Generator().manual_seed(1))
    found = figures(image, torch.cat([image[:, :, ::4, ::4], noise], dim=1))
    assert 0.6 < found["neighbour_correlation"] < 0.99


def test_channels_that_tell_nothing_are_dead():
    image = pictures()
    mean = torch.cat([image[:, :2, ::4, ::4], torch.zeros(200, 1, 2, 2), 7 + 0.01 * image[:, 2:, ::4, ::4]], dim=1)
    std = torch.tensor([0.0, 0.1, 0.0, 1.0]).view(1, 4, 1, 1).expand(mean.shape)
    found = figures(image, mean, std)
    assert found["dead_channels"] == [2, 3]
    assert found["told"][0] == 1
    assert found["told"][1] == pytest.approx(1 / (1 + 0.01 * 12), rel=0.1)  # uniform numbers: variance 1/12
    assert found["channel_mean"] == pytest.approx([0.5, 0.5, 0, 7.005], abs=0.02)
    assert found["channel_std"] == pytest.approx([12**-0.5, (1 / 12 + 0.01) ** 0.5, 0, 1], abs=0.02)


def test_large_pictures_and_few():
    small, large = pictures(100), pictures(100, side=256)
    latents = small[:, :, ::4, ::4]
    found, other = (figures(image, latents)["neighbour_correlation"] for image in (small, large))
    assert found == pytest.approx(other, abs=1e-3)
    assert figures(small[:2], latents[:2])["neighbour_correlation"] is None


def test_a_manifest_has_them_and_may_lack_them(tmp_path):
    values = {"weight_hash": "x", "down_factor": 4, "latent_channels": 3, "image_size": 8, "latent_mean": [0.0] * 3}
    values |= {name: [1.0] * 3 for name in ("latent_std", "latent_mean_confidence", "latent_std_confidence")}
    told = figures(pictures(), pictures()[:, :, ::4, ::4])
    for space in (None, told):
        Manifest(**values, num_images=200, latent_space=space).save(tmp_path / "manifest.json")
        assert Manifest.load(tmp_path / "manifest.json").latent_space == space
    before = (tmp_path / "manifest.json").read_text()
    without = before[: before.index(',\n  "latent_space"')] + "\n}"
    (tmp_path / "manifest.json").write_text(without)
    assert Manifest.load(tmp_path / "manifest.json").latent_space is None
