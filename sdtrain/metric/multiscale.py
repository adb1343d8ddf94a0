"""MS-SSIM (Wang et al. 2003), from torchmetrics, with the data range said aloud."""

from __future__ import annotations

from torch import Tensor

from sdtrain.errors import ConfigError

MIN_SIDE_PIXELS = 161  # five scales, an 11 pixel window at the last


def ms_ssim(real: Tensor, reconstructed: Tensor) -> float:
    """Mean over the pictures (B, 3, H, W) on [0, 1], the reconstructions clamped to it.

    Raises:
        ConfigError: for pictures too small for its five scales.
    """
    from torchmetrics.functional.image import multiscale_structural_similarity_index_measure

    if min(real.shape[2:]) < MIN_SIDE_PIXELS:
        raise ConfigError(
            f"ms_ssim wants pictures of {MIN_SIDE_PIXELS} pixels a side at least, these have {min(real.shape[2:])}; "
            "name the other metrics (--metric)"
        )
    found = multiscale_structural_similarity_index_measure(
        reconstructed.float().clamp(0, 1), real.float(), data_range=1.0, reduction="none", normalize="relu"
    )
    return float(found.mean())
