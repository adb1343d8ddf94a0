"""A picture as a condition, joined to x_t along the channels: a masked one, a small one, or one to edit."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sdtrain.conditioner.dropout import dropped, require_share
from sdtrain.conditioner.mask import draw_masks
from sdtrain.contracts import Batch, Conditioning, Input
from sdtrain.diffusion.path import VariancePreserving
from sdtrain.errors import ConfigError
from sdtrain.ops.random import Draw


class MaskedImage(nn.Module):
    """Inpainting: {"concat": (B, 1 + C, h, w)}, the mask and then the latents of the picture without what it covers.

    The batch's `mask` (B, 1, H, W), 1 where to paint, or one that the sample draws. The null condition is the same.

    Args:
        whole: share of the drawn masks that cover everything.
        width, pooled_width: null, as there is no text.
    """

    inputs = {"image": Input("picture"), "mask": Input("mask")}

    def __init__(self, whole: float = 0.25, width: None = None, pooled_width: None = None) -> None:
        super().__init__()
        require_share(whole=whole)
        self.whole, self.width, self.pooled_width = whole, width, pooled_width

    def forward(self, batch: Batch, draw: Draw | None = None) -> Conditioning:
        """The mask at the latents' size, as inpainting pipelines take it, and the encoded rest of the picture."""
        image = _picture(batch, "image")
        drawn = draw_masks(draw or _own_draw(batch), *image.shape[2:], self.whole).to(image.device)
        mask = batch.get("mask", drawn).to(image.device)
        mask = (torch.where(mask < 0, drawn, mask) >= 0.5).float()  # below 0: the sample has none
        small = F.interpolate(mask, batch["latent_size"])  # (B, 1, h, w)
        return {"concat": torch.cat((small, batch["encode"](image * (1 - mask))), dim=1)}  # (B, 1 + C, h, w)

    def unconditional(self, batch: Batch) -> Conditioning:
        """The same: guidance moves away from no text, not from no picture."""
        return self(batch)


class LowResolution(nn.Module):
    """Upscaling (Ho et al. 2022, "Cascaded diffusion models", section 4): {"concat": (B, 3, h, w), "class_labels":
    (B,)}, the small picture with noise on it, and how much.

    The batch's `image`, made small where it is not, and its `noise_level` (B,). The null condition is the same.

    Args:
        path: of the noise on it, whose steps the levels are.
        max_noise_level: training draws levels below this.
        noise_level: without a draw, where the batch says none.
        width, pooled_width: null, as there is no text.

    Raises:
        ConfigError: for levels that are none of the path's, or were never trained.
    """

    inputs = {"image": Input("picture", at="latent_size"), "noise_level": Input("label", is_needed=False)}

    def __init__(
        self,
        path: VariancePreserving,
        max_noise_level: int = 350,
        noise_level: int = 20,
        width: None = None,
        pooled_width: None = None,
    ) -> None:
        super().__init__()
        if not isinstance(path, VariancePreserving):
            raise ConfigError(f"the small picture's path must be VariancePreserving, not {type(path).__name__}")
        if not 1 <= max_noise_level <= path.num_steps:
            raise ConfigError(f"max_noise_level={max_noise_level} must be 1 to {path.num_steps}, its path's num_steps")
        self.path, self.max_noise_level = path, max_noise_level
        self.noise_level = _level(noise_level, max_noise_level)
        self.width, self.pooled_width = width, pooled_width

    def forward(self, batch: Batch, draw: Draw | None = None) -> Conditioning:
        """The small picture at the latents' size, noised."""
        image, size = _picture(batch, "image"), tuple(batch["latent_size"])
        if tuple(image.shape[2:]) != size:
            image = F.interpolate(image, size, mode="bicubic", antialias=True).clamp(-1, 1)  # (B, 3, h, w)
        own = draw or _own_draw(batch)
        if draw is None:
            said = batch.get("noise_level", [self.noise_level] * len(image))
            level = torch.tensor([_level(value, self.max_noise_level) for value in said], device=image.device)
        else:
            level = draw.bits("noise_level") % self.max_noise_level
        point = self.path((level / (self.path.num_steps - 1)).view(-1, 1, 1, 1))
        noised = point.alpha * image + point.sigma * own.normal("low_resolution", image.shape[1:])
        return {"concat": noised, "class_labels": level}

    def unconditional(self, batch: Batch) -> Conditioning:
        """The same: guidance moves away from no text, not from no picture."""
        return self(batch)


class SourceImage(nn.Module):
    """Editing (Brooks et al. 2023, section 3.2): {"concat": (B, C, h, w)}, the latents of the batch's `source`.

    Args:
        dropout: share of the training pictures that are replaced by zeros. The null condition is zeros where there is
            dropout, and the same picture where there is none.
        dropout_group: conditions of one group are dropped together, those of different groups independently.
        width, pooled_width: null, as there is no text.
    """

    inputs = {"source": Input("picture")}

    def __init__(
        self, dropout: float = 0.05, dropout_group: str = "source", width: None = None, pooled_width: None = None
    ) -> None:
        super().__init__()
        require_share(dropout=dropout)
        self.dropout, self.dropout_group, self.width, self.pooled_width = dropout, dropout_group, width, pooled_width

    def forward(self, batch: Batch, draw: Draw | None = None) -> Conditioning:
        """The picture to edit; with a draw, some of them dropped."""
        latent: Tensor = batch["encode"](_picture(batch, "source"))
        if draw is not None and self.dropout > 0:
            latent = latent.masked_fill(dropped(draw, self.dropout, self.dropout_group).view(-1, 1, 1, 1), 0)
        return {"concat": latent}

    def unconditional(self, batch: Batch) -> Conditioning:
        """Zeros, where training has shown them."""
        told = self(batch)
        return {"concat": torch.zeros_like(told["concat"])} if self.dropout > 0 else told


def _picture(batch: Batch, key: str) -> Tensor:
    if key in batch:
        return batch[key]
    cached = "; set diffusion.cache_latents=false" if "latent" in batch else ""
    raise ConfigError(f"the condition is a picture, and the batch has no '{key}'{cached}")


def _level(value: int, end: int) -> int:
    if not (isinstance(value, int) and 0 <= value < end):
        raise ConfigError(f"noise_level={value!r} must be a whole number from 0 to {end - 1}, as training has it")
    return value


def _own_draw(batch: Batch) -> Draw:
    """Without a draw, a sample's mask or noise is always the same."""
    return Draw(0, batch["sample_id"], torch.zeros_like(batch["sample_id"]))
