"""Text as a condition, from nothing: a small CLIP text model (Radford et al. 2021) that is trained jointly."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from torch import Tensor
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

from sdtrain.conditioner.clip import Layer, encode_clip, freeze_unread
from sdtrain.conditioner.text_encoder import TextEncoder
from sdtrain.conditioner.tokenizer import LEARNED_IDS, Tokens, learned_tokenizer
from sdtrain.contracts import Conditioning
from sdtrain.errors import ConfigError


class Text(TextEncoder):
    """Captions -> hidden states (B, max_tokens, width) and, if asked for, the end token's final state. The null
    condition is the empty caption.

    Args:
        dropout, dropout_group, masked: as for every text encoder.
        width, num_layers, num_heads, vocab_size: of the model; its tokenizer is learned from the training captions.
        pooled_width: of the pooled output, projected where it is not `width`; null for none.
        layer: which hidden states, as for `clip`.
        max_tokens: captions are cut or padded to this.

    Raises:
        ConfigError: for a vocabulary too small for the bytes.
    """

    def __init__(
        self,
        dropout: float = 0.1,
        dropout_group: str = "",
        width: int = 192,
        pooled_width: int | None = None,
        num_layers: int = 2,
        num_heads: int = 3,
        vocab_size: int = 2048,
        layer: Layer = "last",
        masked: bool = False,
        max_tokens: int = 77,
    ) -> None:
        if vocab_size < 259:
            raise ConfigError(f"vocab_size={vocab_size}: the bytes and marks alone are at least 259")
        kind = CLIPTextModel if pooled_width in (None, width) else CLIPTextModelWithProjection
        encoder = kind(
            CLIPTextConfig(
                vocab_size=vocab_size,
                hidden_size=width,
                intermediate_size=4 * width,
                projection_dim=pooled_width or width,
                num_hidden_layers=num_layers,
                num_attention_heads=num_heads,
                max_position_embeddings=max_tokens,
                attn_implementation="eager",  # quicker at these lengths on a CPU
                **LEARNED_IDS,
            )
        )
        freeze_unread(encoder, layer, pooled_width is not None)
        super().__init__(encoder, None, True, dropout, dropout_group, masked=masked)
        self.width, self.pooled_width, self.layer = width, pooled_width, layer
        self.vocab_size, self.max_tokens = vocab_size, max_tokens

    def prepare(self, directory: Path, captions: Callable[[], Sequence[str]]) -> None:
        """Loads the tokenizer from DIR, or learns it from the captions and writes it there."""
        if self.tokens is None:
            self.tokens = Tokens(learned_tokenizer(directory, captions, self.vocab_size), self.max_tokens)

    def encode(self, ids: Tensor, mask: Tensor) -> Conditioning:  # noqa: ARG002 causal: no padding is read
        """Hidden states, and the pooled output if asked for."""
        end_token = self.tokens.tokenizer.eos_token_id
        return encode_clip(self.encoder, ids, end_token, self.layer, self.pooled_width is not None)
