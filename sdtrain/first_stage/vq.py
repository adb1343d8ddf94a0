"""The vector-quantised autoencoder (van den Oord et al. 2017; Esser et al. 2021): pixels <-> codes of a codebook.

Parameter names and configuration keys are those of diffusers' `VQModel`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sdtrain.contracts import Posterior
from sdtrain.first_stage.autoencoder_kl import Decoder, Encoder
from sdtrain.first_stage.whitening import Whitened, fold_input, fold_output
from sdtrain.layer.conv import Conv1x1

_SCORES_AT_ONCE = 2**26  # distances of positions to codes held in memory: 256 MiB in float32
_DEAD_AFTER_BATCHES = 100


class Quantised(NamedTuple):
    """The nearest codes, and what is lost by them."""

    latent: Tensor  # (B, C, h, w); its gradient goes straight through to what was quantised
    index: Tensor  # (B, h, w) int64
    codebook: Tensor  # () |sg[z] - e|^2, the mean over elements: moves the codes
    commitment: Tensor  # () |z - sg[e]|^2: moves the encoder
    perplexity: Tensor  # () how many codes are in use, were they used equally
    num_dead: Tensor  # () codes that this process chose in none of its last 100 training batches


class VectorQuantizer(nn.Module):
    """The codebook. It starts as wide as an untrained encoder's latents.

    Uniform in [-1/K, 1/K], as its authors start it, the commitment drew all latents to the origin before the decoder
    could tell them apart: after 120 steps of a small model an L1 error of 0.63, that of a constant, beside 0.29.
    """

    def __init__(self, num_codes: int, channels: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(num_codes, channels)
        nn.init.normal_(self.embedding.weight, std=0.4)
        # Counts training batches, so it is no part of the weights.
        self.register_buffer("idle_batches", torch.zeros(num_codes, dtype=torch.int64), persistent=False)

    @torch.no_grad()
    def nearest(self, z: Tensor) -> Tensor:
        """(B, C, h, w) -> the index of the nearest code, (B, h, w) int64, by float32 distances."""
        rows = z.float().permute(0, 2, 3, 1).flatten(0, 2)  # (B h w, C)
        codes = self.embedding.weight.float()
        norms, num_rows = codes.square().sum(dim=1), max(_SCORES_AT_ONCE // len(codes), 1)
        with torch.autocast(z.device.type, enabled=False):  # |z - e|^2 = |z|^2 - 2 z e + |e|^2, the first is the same
            found = [torch.addmm(norms, part, codes.T, alpha=-2.0).argmin(dim=1) for part in rows.split(num_rows)]
        return torch.cat(found).view(z.shape[0], *z.shape[2:])  # (B, h, w)

    def forward(self, z: Tensor) -> Quantised:
        """z (B, C, h, w) float32 -> its codes by the straight-through estimator (van den Oord et al. 2017, 3.2)."""
        index = self.nearest(z)
        codes = self.embedding(index).permute(0, 3, 1, 2)  # (B, C, h, w), channels-last
        latent = codes.detach() + (z - z.detach())  # the codes to the last bit: what is added is zero
        codebook, commitment = F.mse_loss(codes, z.detach()), F.mse_loss(z, codes.detach())
        return Quantised(latent, index, codebook, commitment, *self._usage(index.flatten()))

    def _usage(self, index: Tensor) -> tuple[Tensor, Tensor]:
        ones = torch.ones_like(index, dtype=torch.float32)
        share = torch.zeros(len(self.idle_batches), device=index.device).index_add_(0, index, ones) / len(index)
        if torch.is_grad_enabled():
            self.idle_batches.add_(1).masked_fill_(share > 0, 0)
        perplexity = torch.exp(-torch.xlogy(share, share).sum())
        return perplexity, (self.idle_batches >= _DEAD_AFTER_BATCHES).sum()


class VQModel(Whitened):
    """Encodes pictures in [-1, 1] to latents, and decodes latents from the nearest codes.

    Its latents are those before quantisation, which the decoder quantises, so a denoiser need not hit a code
    (Rombach et al. 2022, section 3.1). Whitening is one scale for all channels: nearest codes stay the nearest.

    Args:
        block_out_channels: widths from full resolution down; the down-factor is 2^(their number - 1).
        latent_channels: of encoder and decoder.
        num_vq_embeddings: codes.
        vq_embed_dim: channels of a code and of what the denoiser sees; null for latent_channels.
        mid_block_add_attention: one attention over all positions at the lowest resolution, in encoder and decoder.
        gradient_checkpointing: recompute each block in the backward pass instead of keeping its activations.
    """

    diffusers_class = "VQModel"
    meaningless = {"act_fn": "silu", "norm_type": "group", "lookup_from_codebook": False}

    def __init__(  # noqa: PLR0913 the keys of diffusers' configuration
        self,
        in_channels: int = 3,
        out_channels: int = 3,
        block_out_channels: Sequence[int] = (64,),
        layers_per_block: int = 1,
        latent_channels: int = 3,
        num_vq_embeddings: int = 256,
        norm_num_groups: int = 32,
        vq_embed_dim: int | None = None,
        mid_block_add_attention: bool = True,
        gradient_checkpointing: bool = False,
    ) -> None:
        code_channels = latent_channels if vq_embed_dim is None else vq_embed_dim
        super().__init__(code_channels, shifts_channels=True, scales_channels=False)
        widths = list(block_out_channels)
        shared = (widths, layers_per_block, norm_num_groups, mid_block_add_attention)
        self.encoder = Encoder(in_channels, latent_channels, *shared)
        self.quant_conv = Conv1x1(latent_channels, code_channels)
        self.quantize = VectorQuantizer(num_vq_embeddings, code_channels)
        self.post_quant_conv = Conv1x1(code_channels, latent_channels)
        self.decoder = Decoder(latent_channels, out_channels, *shared)
        self.encoder.gradient_checkpointing = self.decoder.gradient_checkpointing = gradient_checkpointing
        self.down_factor = 2 ** (len(widths) - 1)
        self.to(memory_format=torch.channels_last)

    @property
    def last_layer(self) -> nn.Conv2d:
        """The convolution whose gradients balance the adversarial loss (Esser et al. 2021, equation 7)."""
        return self.decoder.conv_out

    def encode(self, image: Tensor) -> Posterior:
        """(B, 3, H, W) in [-1, 1] -> latents before quantisation, (B, C, H / f, W / f), float32, and a std of 0."""
        latent = self.quant_conv.of_map(self.encoder(image.contiguous(memory_format=torch.channels_last))).float()
        return Posterior(latent, torch.zeros_like(latent))

    def decode(self, latent: Tensor) -> Tensor:
        """(B, C, h, w) unwhitened -> (B, 3, h f, w f) from the nearest codes, about [-1, 1] but not clipped."""
        return self.decode_codes(self.quantize(latent).latent)

    def decode_codes(self, codes: Tensor) -> Tensor:
        """The same from latents that are codes already."""
        return self.decoder(self.post_quant_conv.of_map(codes.contiguous(memory_format=torch.channels_last)))

    def folded_state(self) -> dict[str, Tensor]:
        """The state of the same autoencoder whose own latents and codes are the whitened ones: its scale is 1 and its
        shift 0.
        """
        shift, scale = torch.tensor(self.shift).double(), torch.tensor(self.scale).double()
        folded = fold_output(self, "quant_conv", shift, scale) | fold_input(self, "post_quant_conv", shift, scale)
        state, codes = self.state_dict(), "quantize.embedding.weight"
        folded[codes] = (state[codes].double().cpu() - shift) * scale
        return state | {name: tensor.to(state[name]) for name, tensor in folded.items()}
