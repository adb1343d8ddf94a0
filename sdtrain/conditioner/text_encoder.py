"""What text encoders share: tokens, dropout, the null condition, frozen or trained."""

from __future__ import annotations

import hashlib
import json
from abc import ABC, abstractmethod
from typing import Any, Literal

import torch
from torch import Tensor, nn

from sdtrain.conditioner.dropout import dropped, require_share
from sdtrain.conditioner.tokenizer import Tokens
from sdtrain.contracts import Batch, Conditioning, Input
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

    inputs = {"caption": Input("text")}

    def __init__(
        self,
        encoder: nn.Module,
        tokens: Tokens | None,
        trained: bool = False,
        dropout: float = 0.1,
        dropout_group: str = "",
        empty_caption: Literal["encoded", "zeros"] = "encoded",
        masked: bool = False,
    ) -> None:
        super().__init__()
        require_share(dropout=dropout)
        self.tokens, self.trained, self.masked, self.empty_caption = tokens, trained, masked, empty_caption
        self.dropout, self.dropout_group = dropout, dropout_group
        self.reads_stored = ""  # under this name a batch's stored states stand in for the encoder's own output
        if trained:
            self.encoder = encoder
        else:
            self.frozen = Frozen(encoder)
            self.__dict__["encoder"] = encoder

    @abstractmethod
    def encode(self, ids: Tensor, mask: Tensor) -> Conditioning:
        """Tokens (B, L) and which of them are no padding -> the conditioning."""

    def settings(self) -> dict[str, Any]:
        """With the encoder's weights, what stored states are refused by."""
        vocabulary = json.dumps(sorted(self.tokens.tokenizer.get_vocab().items())) if self.tokens else ""
        return {
            "tokenizer": hashlib.sha256(vocabulary.encode()).hexdigest(),
            "layer": getattr(self, "layer", "last"),
            "width": self.width,
            "pooled_width": self.pooled_width,
            "max_tokens": self.tokens.max_tokens if self.tokens else 0,
            "masked": self.masked,
        }

    def tokenize(self, captions: list[str]) -> tuple[Tensor, Tensor]:
        """(B, max_tokens) int64, cut and padded, and which are no padding."""
        if self.tokens is None:
            raise RuntimeError("prepare() gives the conditioner its tokenizer first")
        return self.tokens(captions)

    def cut_captions(self) -> tuple[int, int]:
        """Of the different captions that this process has tokenized: how many are longer than max_tokens, and all. What
        reads stored states knows of none.
        """
        return (0, 0) if self.reads_stored else (self.tokens.num_cut, self.tokens.num_read)

    def forward(self, batch: Batch, draw: Draw | None = None) -> Conditioning:
        """A batch's captions; with a draw, some of them dropped."""
        captions, device = batch["caption"], self.encoder.device
        # Nothing here waits for the device: copies do not block, and it alone learns which captions are dropped.
        empty = torch.tensor([text == "" for text in captions]).to(device, non_blocking=True)
        gone = dropped(draw, self.dropout, self.dropout_group) if draw is not None and self.dropout > 0 else None
        if gone is not None:
            empty = empty | gone
        if self.reads_stored and f"text_states/{self.reads_stored}" in batch:
            told, mask = self._recalled(batch, gone)
        else:
            told, mask = self._encoded(captions, gone)
        if self.empty_caption == "zeros":
            told = {name: value.masked_fill(empty.view(-1, *[1] * (value.ndim - 1)), 0) for name, value in told.items()}
        return told | {"context_mask": mask} if self.masked else told

    def _encoded(self, captions: list[str], gone: Tensor | None) -> tuple[Conditioning, Tensor]:
        device = self.encoder.device
        ids, mask = (part.to(device, non_blocking=True) for part in self.tokenize([*captions, ""]))
        if gone is not None:
            ids, mask = (torch.where(gone[:, None], part[-1], part[:-1]) for part in (ids, mask))  # (B, L)
        else:
            ids, mask = ids[:-1], mask[:-1]
        with torch.set_grad_enabled(self.trained and torch.is_grad_enabled()):
            return {name: value.float() for name, value in self.encode(ids, mask).items()}, mask

    def _recalled(self, batch: Batch, gone: Tensor | None) -> tuple[Conditioning, Tensor]:
        """What was stored of the captions; of those that are dropped, what the encoder makes of the empty one."""
        stored = {kind: batch.get(f"text_{kind}/{self.reads_stored}") for kind in ("states", "mask", "pooled")}
        told: Conditioning = {"context": stored["states"].float()}
        if stored["pooled"] is not None:
            told["pooled"] = stored["pooled"].float()
        mask = stored["mask"]
        if gone is not None:
            null, seen = self._encoded([""], None)
            told = {
                name: torch.where(gone.view(-1, *[1] * (value.ndim - 1)), null[name], value)
                for name, value in told.items()
            }
            mask = torch.where(gone[:, None], seen, mask)  # (B, L)
        return told, mask

    def unconditional(self, batch: Batch) -> Conditioning:
        """The null condition for as many samples: of the empty caption, or of the batch's `negative`."""
        null = self({"caption": batch.get("negative", [""])})
        return {name: value.expand(len(batch["caption"]), *value.shape[1:]) for name, value in null.items()}
