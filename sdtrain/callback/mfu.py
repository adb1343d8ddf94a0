"""How much of the devices' peak the model's own work is."""

from __future__ import annotations

import re
import time
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from typing_extensions import override

_MEASURED_SECONDS = 0.3
# Of dense products in 16 bits, in TFLOP/s, by their makers' data sheets; the first whose words stand in the name.
_PEAKS = {"B200": 2250, "GH200": 989, "H200": 989, "H100 PCIe": 756, "H100 NVL": 835, "H100": 989, "A100": 312}
_PEAKS |= {"L40S": 362, "L40": 181, "L4": 121, "A40": 150, "A10": 125, "A6000": 155, "4090": 165, "3090": 71}


class MFU(Callback):
    """Model FLOPs utilisation, which the rows of `Log` carry: the FLOPs that training on an image takes, times images
    per second, over the peak of all devices (Chowdhery et al. 2022, appendix B).

    The FLOPs are those of `stage.flops_per_image`: two a multiply-accumulate of products, convolutions and attention;
    forward and backward of what learns, which is three times the forward, and of what is frozen as far as gradients go
    through it; nothing that gradient checkpointing does again. The time is that of `images_per_second`: training alone.
    The peak is the maker's where the precision has 16 bits and the device's name is known. Else it is what large
    matrix products reach here, in the precision's type; that is measured in any case, and stands in the summary.
    """

    def __init__(self) -> None:
        self.flops_per_image = self.peak_flops = self.matmul_peak_flops = 0.0
        self._num_devices, self._images, self._seconds = 1, 0, 0.0

    @override
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.flops_per_image, self._num_devices = pl_module.flops_per_image, trainer.world_size
        device, dtype = trainer.strategy.root_device, _type_of(str(trainer.precision))
        measured = measure_matmul_peak(device, dtype) if self.flops_per_image else 0.0  # which the first rank knows
        self.matmul_peak_flops = trainer.strategy.broadcast(measured)  # meanwhile the others leave it the machine
        name = torch.cuda.get_device_name(device) if device.type == "cuda" else ""
        self.peak_flops = (known_peak(name) if dtype != torch.float32 else None) or self.matmul_peak_flops

    def of(self, num_images: int, seconds: float) -> dict[str, float]:
        """What a row says of so many images of all ranks; nothing where the work was not counted."""
        self._images, self._seconds = self._images + num_images, self._seconds + seconds
        return {"mfu": round(self._share(num_images, seconds), 5)} if self.flops_per_image else {}

    def summary(self) -> dict[str, Any]:
        """Of all rows of this process, and what they were computed with."""
        if not self.flops_per_image or not self._seconds:
            return {}
        return {
            "mfu": round(self._share(self._images, self._seconds), 5),
            "flops_per_image": self.flops_per_image,
            "peak_flops": self.peak_flops,
            "matmul_peak_flops": self.matmul_peak_flops,
        }

    def _share(self, num_images: int, seconds: float) -> float:
        return self.flops_per_image * num_images / seconds / (self.peak_flops * self._num_devices)


def known_peak(name: str) -> float | None:
    """FLOP/s of a device by its name; None for one that is unknown, or a part of one."""
    words = set(re.findall(r"\w+", name))
    if "MIG" in words:
        return None
    return next((1e12 * peak for known, peak in _PEAKS.items() if set(known.split()) <= words), None)


def measure_matmul_peak(device: torch.device, dtype: torch.dtype) -> float:
    """FLOP/s of the fastest product of two square matrices, of sizes that take about 0.3 s together."""
    generator = torch.Generator(device).manual_seed(0)  # not the run's; and a GPU is faster on matrices of one number
    end, side, times, rates = time.perf_counter() + _MEASURED_SECONDS, 256, [0.0], []
    while side <= 8192 and time.perf_counter() + 8 * min(times) < end:
        side, times = 2 * side, []
        matrix = torch.rand(side, side, generator=generator, device=device).to(dtype)
        while len(times) < 3 or (len(times) < 20 and sum(times) < _MEASURED_SECONDS / 4):  # others may use a CPU, too
            times.append(_time_product(matrix))
        rates.append(2 * side**3 / min(times))
    return max(rates)


def _time_product(matrix: torch.Tensor) -> float:
    if matrix.device.type == "cuda":
        torch.cuda.synchronize(matrix.device)
    started = time.perf_counter()
    matrix @ matrix
    if matrix.device.type == "cuda":
        torch.cuda.synchronize(matrix.device)
    return time.perf_counter() - started


def _type_of(precision: str) -> torch.dtype:
    return {"bf16": torch.bfloat16, "16": torch.float16}.get(precision.partition("-")[0], torch.float32)
