"""The picture's sizes as a condition: SDXL's micro-conditioning (Podell et al. 2023, section 2.2)."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from sdtrain.contracts import Batch, Conditioning, Input
from sdtrain.errors import ConfigError
from sdtrain.ops.random import Draw


class Size(nn.Module):
    """{"sizes": (B, 6)}: original height and width, crop top and left, target height and width, in pixels.

    The sample's .json member says `height` and `width` of the original and `crop`, [top, left] in the resized picture.
    What it does not say is what the reader found when it scaled and cropped the file's picture, or else as if the
    picture had been so from the start. The null condition is the same sizes.

    Args:
        width, pooled_width: null, as there is no text.
    """

    inputs = {
        "original_size": Input("size", is_needed=False),
        "crop_top_left": Input("place", is_needed=False),
        "target_size": Input("size", is_needed=False),
    }

    def __init__(self, width: None = None, pooled_width: None = None) -> None:
        super().__init__()
        self.width, self.pooled_width = width, pooled_width
        self.register_buffer("place", torch.zeros(()), persistent=False)  # knows the device

    def forward(self, batch: Batch, draw: Draw | None = None) -> Conditioning:  # noqa: ARG002 never dropped
        """The batch's sizes."""
        num, picture = len(batch["caption"]), self.place.new_tensor(batch["image_size"])
        own = {"original_size": picture, "crop_top_left": torch.zeros_like(picture), "target_size": picture}
        found = [batch.get(name, value).to(picture).expand(num, 2) for name, value in own.items()]
        sizes = torch.cat(found, dim=1)  # (B, 6)
        for i, said in enumerate(batch.get("attributes") or []):
            for place, value in _said(batch, i, said or {}):
                sizes[i, place] = value
        return {"sizes": sizes}

    def unconditional(self, batch: Batch) -> Conditioning:
        """The same: guidance moves away from no text, not from no size."""
        return self(batch)


def _said(batch: Batch, i: int, said: dict[str, Any]) -> list[tuple[int, float]]:
    """What a sample's .json says of its sizes: (place in the row, pixels)."""
    crop = said.get("crop", [])
    crop = list(crop) if isinstance(crop, list | tuple) else [crop]
    given = [(0, said["height"])] if "height" in said else []
    given += [(1, said["width"])] if "width" in said else []
    given += list(enumerate(crop, start=2))
    if len(crop) not in (0, 2) or not all(isinstance(value, int | float) for _, value in given):
        sample = batch["key"][i] if "key" in batch else f"number {i}"
        height, width, crop = (said.get(name) for name in ("height", "width", "crop"))
        raise ConfigError(
            f"sample {sample}: height {height!r}, width {width!r} and crop {crop!r} in its .json must be pixels, crop"
            " as [top, left]"
        )
    return given
