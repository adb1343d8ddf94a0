"""A pretrained T5 encoder (Raffel et al. 2020), whose longer captions and unprojected words SD 3 reads."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn
from transformers import T5EncoderModel

from sdtrain.conditioner.pretrained import find_folder, load, load_tokenizer
from sdtrain.conditioner.text_encoder import TextEncoder
from sdtrain.conditioner.tokenizer import Tokens
from sdtrain.contracts import Batch, Conditioning
from sdtrain.errors import ConfigError
from sdtrain.ops.random import Draw


class T5(TextEncoder):
    """Captions -> the encoder's last hidden states (B, max_tokens, width).

    Args:
        pretrained: a folder, or OWNER/NAME[/FOLDER] out of the Hugging Face cache; null stands in for it with zeros,
            as SD 3's pipeline does where it is left out.
        trained, dropout, dropout_group, empty_caption, masked: as for every text encoder.
        width: of the hidden states; it must be the model's.
        max_tokens: captions are cut or padded to this.

    Raises:
        ConfigError: where the model is not there, or not of this width.
    """

    def __init__(
        self,
        pretrained: str | None,
        trained: bool = False,
        dropout: float = 0.1,
        dropout_group: str = "",
        empty_caption: Literal["encoded", "zeros"] = "encoded",
        width: int = 4096,
        masked: bool = False,
        max_tokens: int = 256,
    ) -> None:
        encoder, tokens = nn.Identity(), None
        if pretrained is not None:
            folder = find_folder(pretrained, "T5 encoder")
            encoder, tokens = load(T5EncoderModel, folder, trained), Tokens(load_tokenizer(folder), max_tokens)
            if width != encoder.config.d_model:
                raise ConfigError(f"width is {width}, but {pretrained} has {encoder.config.d_model}")
        super().__init__(encoder, tokens, trained, dropout, dropout_group, empty_caption, masked)
        self.width, self.pooled_width, self.max_tokens = width, None, max_tokens
        self.register_buffer("silence", torch.zeros(()), persistent=False)
        if pretrained is None:
            self.inputs = {}

    def forward(self, batch: Batch, draw: Draw | None = None) -> Conditioning:
        """A batch's captions; with a draw, some of them dropped."""
        if self.tokens is not None:
            return super().forward(batch, draw)
        silence = self.silence.expand(len(batch["caption"]), self.max_tokens, self.width)  # (B, L, D)
        return {"context": silence} | ({"context_mask": silence[..., 0].bool()} if self.masked else {})

    def encode(self, ids: Tensor, mask: Tensor) -> Conditioning:
        """Hidden states. Attention goes both ways: unless padding is masked, every token reads it (as SD 3 has it)."""
        if self.masked:
            return {"context": self.encoder(input_ids=ids, attention_mask=mask.long()).last_hidden_state}
        return {"context": self.encoder(input_ids=ids).last_hidden_state}
