"""The multimodal diffusion transformer of Stable Diffusion 3 and 3.5 (Esser et al. 2024).

Parameter names and configuration keys are those of diffusers' `SD3Transformer2DModel`, so weights move by copying
files.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from difflib import get_close_matches
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from sdtrain.contracts import Conditioning
from sdtrain.errors import ConfigError
from sdtrain.layer.embedding import TimestepEmbedding, sinusoidal
from sdtrain.layer.joint import JointBlock, Modulation, modulate

_DIFFUSERS_CLASS = "SD3Transformer2DModel"
_TIME_WIDTH = 256


def sincos_2d(dim: int, size: int, base_size: int) -> Tensor:
    """Sinusoidal embedding of a square grid's columns and rows, half the channels each (Dosovitskiy et al. 2021,
    appendix D.4, with the frequencies of Vaswani et al. 2017) -> (size, size, dim) float32.

    The grid is stretched so that its side measures `base_size`, whatever its number of points.
    """
    position = torch.arange(size, dtype=torch.float64) * (base_size / size)
    frequency = 10000.0 ** -(torch.arange(dim // 4, dtype=torch.float64) / (dim // 4))
    angle = position[:, None] * frequency  # (size, dim / 4)
    line = torch.cat((angle.sin(), angle.cos()), dim=1).float()  # (size, dim / 2)
    columns, rows = line[None].expand(size, -1, -1), line[:, None].expand(-1, size, -1)
    return torch.cat((columns, rows), dim=2)  # (size, size, dim)


class PatchEmbed(nn.Module):
    """Patches of the latent as tokens, each with its position added, from the middle of the grid of positions."""

    def __init__(self, dim: int, *, in_channels: int, patch_size: int, base_size: int, max_size: int) -> None:
        super().__init__()
        self.patch_size, self.max_size = patch_size, max_size
        self.proj = nn.Conv2d(in_channels, dim, patch_size, patch_size)
        self.register_buffer("pos_embed", sincos_2d(dim, max_size, base_size).flatten(0, 1)[None])

    def forward(self, x: Tensor) -> Tensor:
        """x (B, C, h, w) -> (B, L, D), L = h w / patch_size^2, row by row."""
        p, n = self.patch_size, self.max_size
        if x.shape[2] % p or x.shape[3] % p:
            raise ConfigError(f"model: a latent of {x.shape[2]}x{x.shape[3]} is not cut evenly by patch_size {p}")
        height, width = x.shape[2] // p, x.shape[3] // p
        if max(height, width) > n:
            raise ConfigError(
                f"model: {height}x{width} patches, but positions for {n}x{n}; raise pos_embed_max_size or take a "
                "smaller picture"
            )
        # The strided convolution as the product it is: its answer lies in the order of tokens, without a transposition.
        patches = x.unflatten(3, (width, p)).unflatten(2, (height, p))  # (B, C, h, p, w, p)
        patches = patches.permute(0, 2, 4, 1, 3, 5).flatten(3).flatten(1, 2)  # (B, L, C p p)
        tokens = F.linear(patches, self.proj.weight.flatten(1), self.proj.bias)
        top, left = (n - height) // 2, (n - width) // 2
        position = self.pos_embed.unflatten(1, (n, n))[:, top : top + height, left : left + width]
        return tokens + position.flatten(1, 2).to(tokens.dtype)


class TimeTextEmbed(nn.Module):
    """What all tokens are told: the time and the pooled text, summed."""

    def __init__(self, dim: int, pooled_dim: int) -> None:
        super().__init__()
        self.timestep_embedder = TimestepEmbedding(_TIME_WIDTH, dim)
        self.text_embedder = TimestepEmbedding(pooled_dim, dim)

    def forward(self, time: Tensor, pooled: Tensor) -> Tensor:
        return self.timestep_embedder(sinusoidal(time, _TIME_WIDTH).to(pooled.dtype)) + self.text_embedder(pooled)


def _check_widths(dim: int, caption_dim: int, joint_dim: int | None, pooled_dim: int | None) -> None:
    if caption_dim != dim:
        raise ConfigError(
            f"model: caption_projection_dim is num_attention_heads x attention_head_dim = {dim}, not {caption_dim}"
        )
    if joint_dim is None or pooled_dim is None:
        raise ConfigError(
            "model: an MMDiT needs a conditioner with text and a pooled output; its joint_attention_dim is "
            f"{joint_dim}, its pooled_projection_dim {pooled_dim}"
        )


class MMDiT(nn.Module):
    """Predicts velocity, noise or data from a noised latent, the time, and a conditioning by text.

    Args:
        sample_size: of the latents that the positions are counted on: a grid of pos_embed_max_size patches a side
            is stretched to it.
        patch_size: a token is so many positions of the latent, squared.
        in_channels: of x_t plus whatever `concat` joins to it.
        joint_attention_dim, pooled_projection_dim: of the context, and of the pooled output beside it.
        caption_projection_dim: of the text's stream: the model's width, num_attention_heads times attention_head_dim.
        out_channels: null for as many as go in.
        pos_embed_max_size: the largest side, in patches.
        dual_attention_layers: blocks with a second attention of the picture alone (0 to 12 in SD3.5-medium).
        qk_norm: "rms_norm" (SD3.5) or null (SD3).
        gradient_checkpointing: forget what happened inside a block, and do it again on the way back.

    Raises:
        ConfigError: for widths that do not fit each other, a conditioner without text, or a qk_norm or layer that it
            does not have.
    """

    seats = ("context", "context_mask", "pooled", "concat")

    def __init__(  # noqa: PLR0913 the keys of diffusers' configuration
        self,
        sample_size: int = 128,
        patch_size: int = 2,
        in_channels: int = 16,
        num_layers: int = 18,
        attention_head_dim: int = 64,
        num_attention_heads: int = 18,
        joint_attention_dim: int | None = 4096,
        caption_projection_dim: int = 1152,
        pooled_projection_dim: int | None = 2048,
        out_channels: int | None = 16,
        pos_embed_max_size: int = 96,
        dual_attention_layers: Sequence[int] = (),
        qk_norm: str | None = None,
        gradient_checkpointing: bool = False,
    ) -> None:
        super().__init__()
        dim = num_attention_heads * attention_head_dim
        _check_widths(dim, caption_projection_dim, joint_attention_dim, pooled_projection_dim)
        if beyond := [i for i in dual_attention_layers if not 0 <= i < num_layers]:
            raise ConfigError(f"model: dual_attention_layers are of 0 to {num_layers - 1}, not {beyond[0]}")
        if qk_norm not in (None, "rms_norm"):
            raise ConfigError(f"model: qk_norm is null or 'rms_norm', not {qk_norm!r}")
        self.in_channels, self.out_channels = in_channels, out_channels or in_channels
        self.patch_size, self.gradient_checkpointing = patch_size, gradient_checkpointing
        self.pos_embed = PatchEmbed(
            dim,
            in_channels=in_channels,
            patch_size=patch_size,
            base_size=sample_size // patch_size,
            max_size=pos_embed_max_size,
        )
        self.time_text_embed = TimeTextEmbed(dim, pooled_projection_dim)
        self.context_embedder = nn.Linear(joint_attention_dim, dim)
        self.transformer_blocks = nn.ModuleList(
            [
                JointBlock(
                    dim,
                    num_attention_heads,
                    qk_norm=qk_norm is not None,
                    last=i == num_layers - 1,
                    dual_attention=i in dual_attention_layers,
                )
                for i in range(num_layers)
            ]
        )
        self.norm_out = Modulation(dim, 2)
        self.proj_out = nn.Linear(dim, patch_size**2 * self.out_channels)
        self.apply(_initialise)
        for module in (self.time_text_embed.timestep_embedder, self.time_text_embed.text_embedder):
            nn.init.normal_(module.linear_1.weight, std=0.02)
            nn.init.normal_(module.linear_2.weight, std=0.02)
        nn.init.zeros_(self.proj_out.weight)

    @classmethod
    def from_diffusers(cls, config: Mapping[str, Any]) -> Self:
        """The network that the content of a diffusers config.json describes.

        Raises:
            ConfigError: for the config of another class, and for a key that diffusers' class does not have.
        """
        kind = config.get("_class_name", _DIFFUSERS_CLASS)
        if kind != _DIFFUSERS_CLASS:
            raise ConfigError(f"model: the config is of a {kind}, not of a {_DIFFUSERS_CLASS}")
        known = inspect.signature(cls).parameters.keys() - {"gradient_checkpointing"}  # each of them is built here
        values = {key: value for key, value in config.items() if not key.startswith("_")}
        for key in values.keys() - known:
            near = "".join(f"; did you mean {name!r}?" for name in get_close_matches(key, known, 1))
            raise ConfigError(f"model: unknown key {key!r}{near}")
        return cls(**values)

    def forward(self, x: Tensor, time: Tensor, cond: Conditioning) -> Tensor:
        """x (B, C, h, w), time (B,) as the network counts it, cond -> (B, out_channels, h, w).

        Raises:
            ConfigError: for a condition that the model has no seat for, or needs and does not get.
        """
        if unknown := cond.keys() - self.seats:
            raise ConfigError(
                f"model: no seat for the condition {', '.join(sorted(unknown))}; there are {', '.join(self.seats)}"
            )
        if missing := {"context", "pooled"} - cond.keys():
            raise ConfigError(f"model: an MMDiT needs the condition {', '.join(sorted(missing))}")
        if "concat" in cond:
            x = torch.cat((x, cond["concat"].to(x.dtype)), dim=1)
        height, width = x.shape[2] // self.patch_size, x.shape[3] // self.patch_size
        temb = F.silu(self.time_text_embed(time, cond["pooled"].to(x.dtype)))
        context = self.context_embedder(cond["context"].to(x.dtype))
        x = self.pos_embed(x)
        mask = cond.get("context_mask")
        if mask is not None:  # the picture's own tokens are always attended to
            mask = F.pad(mask, (x.shape[1], 0), value=True)[:, None, None]  # (B, 1, 1, L + M)
        for block in self.transformer_blocks:
            if self.gradient_checkpointing and torch.is_grad_enabled():
                x, context = checkpoint(block, x, context, temb, mask, use_reentrant=False, preserve_rng_state=False)
            else:
                x, context = block(x, context, temb, mask)
        scale, shift = self.norm_out(temb)
        x = self.proj_out(modulate(x, shift, scale))  # (B, L, p p C)
        x = x.unflatten(2, (self.patch_size, self.patch_size, -1)).unflatten(1, (height, width))
        return x.permute(0, 5, 1, 3, 2, 4).flatten(4).flatten(2, 3)  # (B, C, h, w)


def _initialise(module: nn.Module) -> None:
    """As DiT (Peebles and Xie 2023, section 3.2 and its code): no biases, Xavier's weights, modulations zero."""
    if isinstance(module, Modulation):  # after its own linear layer, since `apply` goes to the children first
        nn.init.zeros_(module.linear.weight)
    elif isinstance(module, nn.Linear | nn.Conv2d):
        nn.init.xavier_uniform_(module.weight.flatten(1))
        nn.init.zeros_(module.bias)
