"""Text by concatenation to the input: its pooled output at every place, beside or instead of cross-attention."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from torch import nn

from sdtrain.contracts import Batch, Conditioning
from sdtrain.errors import ConfigError
from sdtrain.ops.random import Draw


class Broadcast(nn.Module):
    """Another conditioner's `pooled` (B, D) as `concat` (B, D, h, w).

    Args:
        text: the other, with a pooled output.
        width: the other's, where its context goes to cross-attention as well; null leaves its context out.
        pooled_width: null, as the pooled output goes no other way.

    Raises:
        ConfigError: where there is nothing pooled, or the width is not the other's.
    """

    def __init__(self, text: nn.Module, width: int | None, pooled_width: None = None) -> None:
        super().__init__()
        if text.pooled_width is None:
            raise ConfigError("text.pooled_width is null: there is no pooled output to join to the input")
        if width not in (None, text.width):
            raise ConfigError(f"width is {width}, but text has {text.width}; null leaves its context out")
        self.text, self.width, self.pooled_width, self.inputs = text, width, pooled_width, text.inputs

    def prepare(self, directory: Path, captions: Callable[[], Sequence[str]]) -> None:
        """The text's tokenizer, where it learns one."""
        if hasattr(self.text, "prepare"):
            self.text.prepare(directory, captions)

    def forward(self, batch: Batch, draw: Draw | None = None) -> Conditioning:
        """What the text says, at every place of the latent."""
        return self._broadcast(self.text(batch, draw), batch)

    def unconditional(self, batch: Batch) -> Conditioning:
        """The text's null condition, likewise."""
        return self._broadcast(self.text.unconditional(batch), batch)

    def _broadcast(self, told: Conditioning, batch: Batch) -> Conditioning:
        pooled = told["pooled"]
        kept = {} if self.width is None else {k: v for k, v in told.items() if k.startswith("context")}
        return kept | {"concat": pooled[:, :, None, None].expand(-1, -1, *batch["latent_size"])}  # (B, D, h, w)
