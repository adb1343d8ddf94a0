"""What text encoders share: tokens, dropout, the null condition, frozen or trained."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Literal

import torch
from torch import Tensor, nn

from sdtrain.conditioner.dropout import dropped
from sdtrain.conditioner.tokenizer import Tokens
from sdtrain.contracts import Batch, Conditioning
from sdtrain.layer.frozen import Frozen
from sdtrain.ops.random import Draw


class TextEncoder(nn.Module, ABC):
    """Captions -> what a transformers model makes of them, in float32. A subclass says in `encode` what it takes.

    Args:
        encoder: a frozen one is neither trained nor saved and stays in its own precision, whatever the run's is.
        tokens: its tokenizer; None until `prepare` gives it.
        dropout: share of the training captions that are replaced by the empty one (Ho and Salimans 2021, algorithm 1).
        dropout_group: conditions of one group are dropped together, those of different groups independently.
        empty_caption: what the null condition is: what the encoder makes of the empty caption, or zeros in its place.
        masked: whether padding is masked (`context_mask`), for the denoiser and for an encoder that looks ahead.
    """

    def __init__(
        self,
        encoder: nn.Module,
        tokens: Tokens | None,
        trained: bool,
        dropout: float,
        dropout_group: str,
        empty_caption: Literal["encoded", "zeros"] = "encoded",
        masked: bool = False,
    ) -> None:
        super().__init__()
        self.tokens, self.trained, self.masked, self.empty_caption = tokens, trained, masked, empty_caption
        self.dropout, self.dropout_group = dropout, dropout_group
        if trained:
            self.encoder = encoder
        else:
            self.frozen = Frozen(encoder)
            self.__dict__["encoder"] = encoder

    @abstractmethod
    def encode(self, ids: Tensor, mask: Tensor) -> Conditioning:
        """Tokens (B, L) and which of them are no padding -> the conditioning."""

    def tokenize(self, captions: list[str]) -> tuple[Tensor, Tensor]:
        """(B, max_tokens) int64, cut and padded, and which are no padding."""
        if self.tokens is None:
            raise RuntimeError("prepare() gives the conditioner its tokenizer first")
        return self.tokens(captions)

    def forward(self, batch: Batch, draw: Draw | None = None) -> Conditioning:
        """A batch's captions; with a draw, some of them dropped."""
        captions, device = batch["caption"], self.encoder.device
        # Nothing here waits for the device: copies do not block, and it alone learns which captions are dropped.
        ids, mask = (part.to(device, non_blocking=True) for part in self.tokenize([*captions, ""]))
        empty = torch.tensor([text == "" for text in captions]).to(device, non_blocking=True)
        if draw is not None and self.dropout > 0:
            gone = dropped(draw, self.dropout, self.dropout_group)
            ids, mask = (torch.where(gone[:, None], part[-1], part[:-1]) for part in (ids, mask))  # (B, L)
            empty = empty | gone
        else:
            ids, mask = ids[:-1], mask[:-1]
        with torch.set_grad_enabled(self.trained and torch.is_grad_enabled()):
            told = {name: value.float() for name, value in self.encode(ids, mask).items()}
        if self.empty_caption == "zeros":
            told = {name: value.masked_fill(empty.view(-1, *[1] * (value.ndim - 1)), 0) for name, value in told.items()}
        return told | {"context_mask": mask} if self.masked else told

    def unconditional(self, batch: Batch) -> Conditioning:
        """The null condition for as many samples."""
        null = self({"caption": [""]})
        return {name: value.expand(len(batch["caption"]), *value.shape[1:]) for name, value in null.items()}
