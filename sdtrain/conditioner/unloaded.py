"""Pretrained text encoders at their true sizes with nothing loaded: what a plan asks instead of `clip` and `t5`.

No config names these, so their arguments need not be spelled out for the preflight: `values` are `TextEncoder`'s.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import suppress
from typing import Any

import torch
from torch import Tensor
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, T5Config, T5EncoderModel

from sdtrain.conditioner.clip import Layer, encode_clip
from sdtrain.conditioner.pretrained import find_folder
from sdtrain.conditioner.text_encoder import TextEncoder
from sdtrain.contracts import Conditioning
from sdtrain.errors import ConfigError

# Layers, heads and the feed-forward's width of the published ones, by the width of their hidden states.
_CLIP_SIZES = {768: (12, 12, 3072), 1024: (24, 16, 4096), 1280: (32, 20, 5120)}  # L, OpenCLIP H, bigG
_T5_SIZES = {512: (8, 6, 1024), 768: (12, 12, 2048), 1024: (24, 16, 2816), 2048: (24, 32, 5120), 4096: (24, 64, 10240)}
_CLIP_VOCABULARY, _CLIP_END = 49408, 49407


class AnyTokens:
    """Stands in for a tokenizer: every caption is as long as captions may be."""

    eos_token_id = _CLIP_END

    def __init__(self, max_tokens: int) -> None:
        self.max_tokens, self.tokenizer = max_tokens, self

    def __call__(self, captions: list[str]) -> tuple[Tensor, Tensor]:
        """(B, max_tokens) int64, and which of them are no padding."""
        ids = torch.zeros(len(captions), self.max_tokens, dtype=torch.int64)
        return ids, ids == 0


class CLIP(TextEncoder):
    """As `sdtrain.conditioner.clip.CLIP`: of the config in its folder, or else of the known size that its width has, in
    float32, as OpenAI's is saved.

    Raises:
        ConfigError: for a width that no known model has.
    """

    def __init__(
        self,
        pretrained: str,
        width: int = 768,
        pooled_width: int | None = None,
        layer: Layer = "last",
        max_tokens: int = 77,
        **values: Any,  # noqa: ANN401
    ) -> None:
        config = None
        with suppress(ConfigError):
            config = CLIPTextConfig.from_pretrained(find_folder(pretrained, "CLIP text model"))
        if config is None:
            num_layers, num_heads, inner = _size_of(_CLIP_SIZES, width, pretrained)
            is_stable_diffusion_2 = width == 1024 and layer == "last"  # it was saved without the layer it does not read
            config = CLIPTextConfig(
                vocab_size=_CLIP_VOCABULARY,
                hidden_size=width,
                intermediate_size=inner,
                projection_dim=pooled_width or width,
                num_hidden_layers=num_layers - is_stable_diffusion_2,
                num_attention_heads=num_heads,
                max_position_embeddings=max_tokens,
            )
        encoder = (CLIPTextModelWithProjection if pooled_width else CLIPTextModel)(config)
        super().__init__(encoder, AnyTokens(max_tokens), **values)
        self.width, self.pooled_width, self.layer = width, pooled_width, layer

    def encode(self, ids: Tensor, mask: Tensor) -> Conditioning:  # noqa: ARG002 as there
        """Hidden states, and the pooled output if asked for."""
        return encode_clip(self.encoder, ids, _CLIP_END, self.layer, self.pooled_width is not None)


class T5(TextEncoder):
    """As `sdtrain.conditioner.t5.T5`: of the config in its folder, or else of the known size that its width has, in
    half precision, as Stable Diffusion 3's is saved.

    Raises:
        ConfigError: for a width that no known model has.
    """

    def __init__(
        self,
        pretrained: str,
        width: int = 4096,
        max_tokens: int = 256,
        **values: Any,  # noqa: ANN401
    ) -> None:
        config = None
        with suppress(ConfigError):
            config = T5Config.from_pretrained(find_folder(pretrained, "T5 encoder"))
        if config is None:
            num_layers, num_heads, inner = _size_of(_T5_SIZES, width, pretrained)
            sizes = {"d_model": width, "d_kv": 64, "d_ff": inner, "num_layers": num_layers, "num_heads": num_heads}
            config = T5Config(vocab_size=32128, feed_forward_proj="gated-gelu", **sizes)
        encoder = T5EncoderModel(config)
        encoder = encoder if values.get("trained") else encoder.half()
        super().__init__(encoder, AnyTokens(max_tokens), **values)
        self.width, self.pooled_width = width, None

    def encode(self, ids: Tensor, mask: Tensor) -> Conditioning:  # noqa: ARG002 as there
        """Hidden states."""
        return {"context": self.encoder(input_ids=ids).last_hidden_state}


def _size_of(sizes: Mapping[int, tuple[int, int, int]], width: int, pretrained: str) -> tuple[int, int, int]:
    if width not in sizes:
        raise ConfigError(
            f"pretrained={pretrained} is not there, and no size is known of width {width}, only of "
            + ", ".join(map(str, sizes))
        )
    return sizes[width]
