"""The picture's sizes as a condition: SDXL's micro-conditioning (Podell et al. 2023, section 2.2)."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from sdtrain.contracts import Batch, Conditioning
from sdtrain.errors import ConfigError
from sdtrain.ops.random import Draw


class Size(nn.Module):
    """{"sizes": (B, 6)}: original height and width, crop top and left, target height and width, in pixels.

    The sample's .json member says `height` and `width` of the original and `crop`, [top, left] in the resized picture.
    What it does not say is taken as if the picture had been so from the start. The null condition is the same sizes.

    Args:
        width, pooled_width: null, as there is no text.
    """

    def __init__(self, width: None = None, pooled_width: None = None) -> None:
        super().__init__()
        self.width, self.pooled_width = width, pooled_width
        self.register_buffer("place", torch.zeros(()), persistent=False)  # knows the device

    def forward(self, batch: Batch, draw: Draw | None = None) -> Conditioning:  # noqa: ARG002 never dropped
        """The batch's sizes."""
        num, target = len(batch["caption"]), batch["image_size"]
        attributes = batch.get("attributes") or [None] * num
        rows = [(*_original(batch, i, attributes[i] or {}, target), *target) for i in range(num)]
        return {"sizes": self.place.new_tensor(rows)}  # (B, 6)

    def unconditional(self, batch: Batch) -> Conditioning:
        """The same: guidance moves away from no text, not from no size."""
        return self(batch)


def _original(batch: Batch, i: int, said: dict[str, Any], target: tuple[int, int]) -> tuple[float, ...]:
    height, width, crop = said.get("height", target[0]), said.get("width", target[1]), said.get("crop", [0, 0])
    values = (height, width, *(crop if isinstance(crop, list | tuple) else [crop]))
    if len(values) != 4 or not all(isinstance(value, int | float) for value in values):
        sample = batch["key"][i] if "key" in batch else f"number {i}"
        raise ConfigError(
            f"sample {sample}: height {height!r}, width {width!r} and crop {crop!r} in its .json must be pixels, crop"
            " as [top, left]"
        )
    return values
