"""PSNR, SSIM and L1 by hand."""

from pathlib import Path

import pytest
import torch
from hydra.utils import instantiate
from omegaconf import OmegaConf

from sdtrain.metric.reconstruction import reconstruction

CONFIG = Path(__file__).parents[2] / "configs/metric/autoencoder.yaml"


def test_psnr_is_the_mean_over_the_pictures():
    real = torch.full((2, 3, 16, 16), 0.5)
    off = real + torch.tensor([0.1, 0.01]).view(2, 1, 1, 1)
    figures = reconstruction(real, off)
    assert figures["psnr"] == pytest.approx((20 + 40) / 2, abs=1e-3)  # of the mean squared error it would be 22.97
    assert figures["l1"] == pytest.approx(0.055, abs=1e-6)
    assert figures["out_of_range"] == 0


def test_it_clamps_and_counts_what_it_clamped():
    real = torch.ones(1, 3, 16, 16)
    over = real.clone()
    over[:, :, :4] = 1.5
    figures = reconstruction(real, over)
    assert figures["out_of_range"] == 0.25
    assert figures["l1"] == 0
    assert figures["psnr"] == 100  # equal once clamped, and no infinity in a JSON file
    assert figures["ssim"] == pytest.approx(1)


def test_ssim_of_constant_pictures_by_hand():
    figures = reconstruction(torch.full((1, 3, 32, 32), 0.2), torch.full((1, 3, 32, 32), 0.6))
    assert figures["ssim"] == pytest.approx(
        (2 * 0.2 * 0.6 + 1e-4) / (0.2**2 + 0.6**2 + 1e-4), abs=1e-3
    )  # (Wang, eq. 6)


def test_batches_join_by_weighted_means():
    generator = torch.Generator().manual_seed(0)
    real = torch.rand(6, 3, 16, 16, generator=generator)
    other = real + 0.1 * torch.randn(real.shape, generator=generator)
    whole, first, rest = (reconstruction(real[s], other[s]) for s in (slice(None), slice(2), slice(2, None)))
    for name in whole:
        assert whole[name] == pytest.approx((2 * first[name] + 4 * rest[name]) / 6, rel=1e-5)


@pytest.mark.parametrize("real", [torch.full((1, 3, 16, 16), -0.5), torch.full((1, 3, 16, 16), 200.0)])
def test_a_wrong_range_is_refused(real):
    with pytest.raises(ValueError, match=r"\[0, 1\]"):
        reconstruction(real, real)


def test_the_config_builds_it():
    figures = instantiate(OmegaConf.load(CONFIG)).reconstruction(torch.zeros(1, 3, 16, 16), torch.zeros(1, 3, 16, 16))
    assert set(figures) == {"psnr", "ssim", "l1", "out_of_range"}
