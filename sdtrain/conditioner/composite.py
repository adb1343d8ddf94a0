"""Several conditioners as one: SDXL's two text encoders and its sizes, SD 3's three text encoders, text and a mask."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sdtrain.contracts import Batch, Conditioning
from sdtrain.errors import ConfigError
from sdtrain.ops.random import Draw


class Composite(nn.Module):
    """Asks every part. Pooled outputs are joined in the parts' order along their features, `concat` along its channels.

    Args:
        parts: conditioners by name; null leaves one out.
        width: of the joined context; it must be what the parts give, and stands here for the denoiser's config to read.
        pooled_width: the same of the joined pooled output.
        join: contexts along their features (SDXL: one token, two readings), or along the tokens, the narrower ones
            filled up with zeros (SD 3).

    Raises:
        ConfigError: where the widths are not the parts'.
    """

    def __init__(
        self,
        parts: Mapping[str, nn.Module | None],
        width: int | None,
        pooled_width: int | None = None,
        join: Literal["features", "tokens"] = "features",
    ) -> None:
        super().__init__()
        self.parts = nn.ModuleDict({name: part for name, part in parts.items() if part is not None})
        widths = [part.width for part in self.parts.values() if part.width is not None]
        pooled = [part.pooled_width for part in self.parts.values() if part.pooled_width is not None]
        joined = (sum(widths) if join == "features" else max(widths, default=0)) or None
        for name, said, found in (("width", width, joined), ("pooled_width", pooled_width, sum(pooled) or None)):
            if said != found:
                raise ConfigError(f"{name} is {said}, but the parts {', '.join(self.parts)} give {found} together")
        self.width, self.pooled_width, self.join = width, pooled_width, join
        self.inputs = {key: read for part in self.parts.values() for key, read in part.inputs.items()}

    def prepare(self, directory: Path, captions: Callable[[], Sequence[str]]) -> None:
        """Every part that learns from the captions, in a directory of its own."""
        for name, part in self.parts.items():
            if hasattr(part, "prepare"):
                part.prepare(directory / name, captions)

    def forward(self, batch: Batch, draw: Draw | None = None) -> Conditioning:
        """What all parts say. Which of them drop a sample together, their `dropout_group` says."""
        return self._joined([part(batch, draw) for part in self.parts.values()])

    def unconditional(self, batch: Batch) -> Conditioning:
        """The null conditions of all parts."""
        return self._joined([part.unconditional(batch) for part in self.parts.values()])

    def _joined(self, told: list[Conditioning]) -> Conditioning:
        if any("context_mask" in one for one in told):  # the others' tokens are all seen
            told = [{"context_mask": _all_seen(one)} | one if "context" in one else one for one in told]
        names = dict.fromkeys(name for one in told for name in one)
        found = {name: [one[name] for one in told if name in one] for name in names}
        return {name: self._join(name, values) if len(values) > 1 else values[0] for name, values in found.items()}

    def _join(self, name: str, values: list[Tensor]) -> Tensor:
        if name == "context" and self.join == "tokens":
            return torch.cat([F.pad(v, (0, self.width - v.shape[-1])) for v in values], dim=1)  # (B, L1 + L2, width)
        if name == "context_mask":
            return torch.cat(values, dim=1) if self.join == "tokens" else torch.stack(values).any(dim=0)  # (B, L)
        if name in ("context", "pooled"):
            return torch.cat(values, dim=-1)  # (B, L, width) or (B, width)
        if name == "concat":
            return torch.cat(values, dim=1)  # (B, C1 + C2, h, w)
        raise ConfigError(f"{len(values)} of the parts {', '.join(self.parts)} give {name}, and only one can be told")


def _all_seen(told: Conditioning) -> Tensor:
    return torch.ones(told["context"].shape[:2], dtype=torch.bool, device=told["context"].device)  # (B, L)
