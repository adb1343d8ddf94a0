"""A pretrained CLIP text model (Radford et al. 2021): CLIP-L, and OpenCLIP's H and bigG as transformers holds them."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn
from transformers import CLIPTextModel, CLIPTextModelWithProjection

from sdtrain.conditioner.pretrained import architectures, find_folder, load, load_tokenizer
from sdtrain.conditioner.text_encoder import TextEncoder
from sdtrain.conditioner.tokenizer import Tokens
from sdtrain.contracts import Conditioning
from sdtrain.errors import ConfigError

Layer = Literal["last", "penultimate", "penultimate_norm"]


class CLIP(TextEncoder):
    """Captions -> hidden states (B, max_tokens, width) and, if asked for, the end token's final state, projected where
    the model has a projection.

    Args:
        pretrained: a folder, or OWNER/NAME[/FOLDER] out of the Hugging Face cache.
        trained, dropout, dropout_group, empty_caption, masked: as for every text encoder.
        width: of the hidden states. It must be the model's; it stands here for the denoiser's config to read.
        pooled_width: the same of the pooled output; null for none.
        layer: the hidden states of the last layer with the final layer norm (SD 1), of the one before without it
            (SDXL, SD 3), or of the one before with it (SD 2, of OpenCLIP-H's 24 layers).
        max_tokens: captions are cut or padded to this.

    Raises:
        ConfigError: where the model is not there, or not of these widths.
    """

    def __init__(
        self,
        pretrained: str,
        trained: bool = False,
        dropout: float = 0.1,
        dropout_group: str = "",
        empty_caption: Literal["encoded", "zeros"] = "encoded",
        width: int = 768,
        pooled_width: int | None = None,
        layer: Layer = "last",
        masked: bool = False,
        max_tokens: int = 77,
    ) -> None:
        folder = find_folder(pretrained, "CLIP text model")
        kind = CLIPTextModel if architectures(folder) == ["CLIPTextModel"] else CLIPTextModelWithProjection
        encoder = load(kind, folder, trained)
        config = encoder.config
        pooled = config.projection_dim if kind is CLIPTextModelWithProjection else config.hidden_size
        for name, said, found in (("width", width, config.hidden_size), ("pooled_width", pooled_width, pooled)):
            if said not in (None, found):
                raise ConfigError(f"{name} is {said}, but {pretrained} has {found}")
        if max_tokens > config.max_position_embeddings:
            raise ConfigError(
                f"max_tokens is {max_tokens}, but {pretrained} reads at most {config.max_position_embeddings}"
            )
        if trained:
            freeze_unread(encoder, layer, pooled_width is not None)
        tokens = Tokens(load_tokenizer(folder), max_tokens)
        super().__init__(encoder, tokens, trained, dropout, dropout_group, empty_caption, masked)
        self.width, self.pooled_width, self.layer = width, pooled_width, layer

    def encode(self, ids: Tensor, mask: Tensor) -> Conditioning:  # noqa: ARG002 causal: no padding is read
        """Hidden states, and the pooled output if asked for."""
        end_token = self.tokens.tokenizer.eos_token_id
        return encode_clip(self.encoder, ids, end_token, self.layer, self.pooled_width is not None)


def encode_clip(encoder: nn.Module, ids: Tensor, end_token: int, layer: Layer, pooled: bool) -> Conditioning:
    """What a CLIP text model of transformers says of tokens (B, L)."""
    model = getattr(encoder, "text_model", encoder)  # inside of the one with a projection
    out = model(input_ids=ids, output_hidden_states=True)
    states = out.last_hidden_state if layer == "last" else out.hidden_states[-2]  # (B, L, D)
    told: Conditioning = {"context": model.final_layer_norm(states) if layer == "penultimate_norm" else states}
    if pooled:
        # Attention is causal: the end token alone has read all. Not transformers' pooler_output, which takes the token
        # of the highest number for it where the configured number is 2.
        end = (ids == end_token).int().argmax(dim=1)
        state = out.last_hidden_state[torch.arange(len(ids), device=ids.device), end]  # (B, D)
        told["pooled"] = encoder.text_projection(state) if hasattr(encoder, "text_projection") else state
    return told


def freeze_unread(encoder: nn.Module, layer: Layer, pooled: bool) -> None:
    """Parameters that nothing will read get no gradient, which DDP waits for."""
    model = getattr(encoder, "text_model", encoder)
    unread = [model.encoder.layers[-1]] if layer != "last" else []
    unread += [model.final_layer_norm] if layer == "penultimate" else []
    unread += [encoder.text_projection] if hasattr(encoder, "text_projection") else []
    for module in () if pooled else unread:
        module.requires_grad_(False)
