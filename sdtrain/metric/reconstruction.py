"""How near a reconstruction is to its picture: PSNR, SSIM and L1, from torchmetrics, with the data range said aloud."""

from __future__ import annotations

from torch import Tensor

MAX_PSNR = 100.0  # of pictures that are equal, where it would be infinite


def reconstruction(real: Tensor, reconstructed: Tensor) -> dict[str, float]:
    """Figures of a batch of pictures (B, 3, H, W) on the range [0, 1]; `real` outside of it is refused.

    Each figure is the mean over the pictures of the picture's own value, the field's habit (not the PSNR of the mean
    squared error), so batches are joined by means weighted with their sizes. The reconstruction is clamped to [0, 1]
    first; "out_of_range" is the share of its values that this moved.
    """
    from torchmetrics.functional.image import peak_signal_noise_ratio, structural_similarity_index_measure

    real, raw = real.detach().float(), reconstructed.detach().float()
    if real.min() < 0 or real.max() > 1:
        raise ValueError(f"pictures on [0, 1] wanted, real ones on [{real.min():.3g}, {real.max():.3g}] given")
    clamped = raw.clamp(0, 1)
    psnr = peak_signal_noise_ratio(clamped, real, data_range=1.0, dim=(1, 2, 3), reduction="none")
    ssim = structural_similarity_index_measure(clamped, real, data_range=1.0)
    return {
        "psnr": float(psnr.clamp(max=MAX_PSNR).mean()),
        "ssim": float(ssim),
        "l1": float((clamped - real).abs().mean()),
        "out_of_range": float((clamped != raw).float().mean()),
    }
