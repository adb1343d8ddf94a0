"""MS-SSIM: 1 of equal pictures, less of noisy ones, and refused where its scales do not fit."""

import pytest
import torch

from sdtrain.errors import ConfigError
from sdtrain.metric.multiscale import ms_ssim


def test_ms_ssim():
    real = torch.rand(2, 3, 176, 176, generator=torch.Generator().manual_seed(0))
    assert ms_ssim(real, real) == pytest.approx(1, abs=1e-5)
    assert ms_ssim(real, real * 3 - 1) == pytest.approx(ms_ssim(real, (real * 3 - 1).clamp(0, 1)))
    assert ms_ssim(real, 0.5 * real + 0.5 * real.flip(3)) < 0.9
    with pytest.raises(ConfigError, match="161 pixels a side"):
        ms_ssim(real[..., :160], real[..., :160])
