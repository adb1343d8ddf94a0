"""No condition at all: the denoiser learns the pictures alone."""

from __future__ import annotations

from torch import nn

from sdtrain.contracts import Batch, Conditioning
from sdtrain.ops.random import Draw


class Nothing(nn.Module):
    """An empty conditioning; guidance has nothing to guide by.

    Args:
        width: null, as there is no context for a denoiser to attend to.
    """

    def __init__(self, width: None = None) -> None:
        super().__init__()
        self.width = width

    def forward(self, batch: Batch, draw: Draw | None = None) -> Conditioning:  # noqa: ARG002 the signature all share
        return {}

    def unconditional(self, batch: Batch) -> Conditioning:  # noqa: ARG002
        """Also empty."""
        return {}
