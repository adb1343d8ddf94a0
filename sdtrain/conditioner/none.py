"""No condition at all: the denoiser learns the pictures alone."""

from __future__ import annotations

from torch import nn

from sdtrain.contracts import Batch, Conditioning, Input
from sdtrain.ops.random import Draw


class Nothing(nn.Module):
    """An empty conditioning; guidance has nothing to guide by.

    Args:
        width, pooled_width: null, as there is no text for a denoiser to attend to.
    """

    inputs: dict[str, Input] = {}

    def __init__(self, width: None = None, pooled_width: None = None) -> None:
        super().__init__()
        self.width, self.pooled_width = width, pooled_width

    def forward(self, batch: Batch, draw: Draw | None = None) -> Conditioning:  # noqa: ARG002 the signature all share
        return {}

    def unconditional(self, batch: Batch) -> Conditioning:  # noqa: ARG002
        """Also empty."""
        return {}
