"""The U-Net of latent diffusion (Rombach et al. 2022): residual blocks, spatial transformers, skip connections.

Parameter names and configuration keys are those of diffusers' `UNet2DConditionModel`, so weights move by copying files.
"""

from __future__ import annotations

import inspect
from collections.abc import Collection, Mapping, Sequence
from difflib import get_close_matches
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from sdtrain.contracts import Conditioning
from sdtrain.errors import ConfigError
from sdtrain.layer.embedding import TimestepEmbedding, sinusoidal
from sdtrain.layer.level import Level, LevelMaker, LevelShape
from sdtrain.layer.norm import GroupNorm

# The types of blocks, and whether such a one has transformers.
DOWN_BLOCKS = {"CrossAttnDownBlock2D": True, "DownBlock2D": False}
MID_BLOCKS = {"UNetMidBlock2DCrossAttn": True, "UNetMidBlock2D": False, None: None}
UP_BLOCKS = {"CrossAttnUpBlock2D": True, "UpBlock2D": False}
CLASS_EMBEDDINGS = ("timestep", "identity", "projection", None)
ADDITION_EMBEDDINGS = ("text_time", None)
_DIFFUSERS_CLASS = "UNet2DConditionModel"
# Keys of diffusers' class with one value that is built here, its default.
FIXED: Mapping[str, Any] = {
    "center_input_sample": False,
    "downsample_padding": 1,
    "mid_block_scale_factor": 1,
    "act_fn": "silu",
    "reverse_transformer_layers_per_block": None,
    "encoder_hid_dim": None,
    "encoder_hid_dim_type": None,
    "num_attention_heads": None,
    "dual_cross_attention": False,
    "resnet_time_scale_shift": "default",
    "resnet_skip_time_act": False,
    "resnet_out_scale_factor": 1.0,
    "time_embedding_type": "positional",
    "time_embedding_dim": None,
    "time_embedding_act_fn": None,
    "timestep_post_act": None,
    "time_cond_proj_dim": None,
    "conv_in_kernel": 3,
    "conv_out_kernel": 3,
    "attention_type": "default",
    "class_embeddings_concat": False,
    "mid_block_only_cross_attention": None,
    "cross_attention_norm": None,
    "addition_embed_type_num_heads": 64,
}
# Keys that change nothing here: the size is the latent's, and attention sums in float32 as it is.
_SAYS_NOTHING = {"sample_size", "upcast_attention"}


class UNet(nn.Module):
    """Predicts noise, velocity or data from a noised latent, the time, and a conditioning.

    Args:
        in_channels: of x_t plus whatever `concat` joins to it (9 for inpainting, 7 for upscaling, 8 for editing).
        out_channels: as the latent; twice that for a learned variance.
        layers_per_block, transformer_layers_per_block, only_cross_attention: one for all levels, or a list.
        cross_attention_dim: of the context; null attends to itself.
        attention_head_dim: as in diffusers, the *number* of heads of each level (its configuration misnames it).
        use_linear_projection: SD 2.x and XL; SD 1.x has 1x1 convolutions.
        num_class_embeds: a table of class labels, added to the timestep embedding.
        class_embed_type: "timestep" embeds `class_labels` as the time is; "identity" adds them as they are;
            "projection" adds a projected `pooled` vector of projection_class_embeddings_input_dim.
        addition_embed_type: "text_time" adds `pooled` and each of `sizes`, embedded addition_time_embed_dim wide,
            together projected from projection_class_embeddings_input_dim (SDXL).
        gradient_checkpointing: forget what happened inside a block, and do it again on the way back.

    Raises:
        ConfigError: for a block or embedding type it does not have, lists of different lengths, or a width left out.
    """

    def __init__(  # noqa: PLR0913 the keys of diffusers' configuration
        self,
        in_channels: int = 4,
        out_channels: int = 4,
        flip_sin_to_cos: bool = True,
        freq_shift: int = 0,
        down_block_types: Sequence[str] = ("CrossAttnDownBlock2D",) * 3 + ("DownBlock2D",),
        mid_block_type: str | None = "UNetMidBlock2DCrossAttn",
        up_block_types: Sequence[str] = ("UpBlock2D",) + ("CrossAttnUpBlock2D",) * 3,
        only_cross_attention: bool | Sequence[bool] = False,
        block_out_channels: Sequence[int] = (320, 640, 1280, 1280),
        layers_per_block: int | Sequence[int] = 2,
        dropout: float = 0.0,
        norm_num_groups: int = 32,
        norm_eps: float = 1e-5,
        cross_attention_dim: int | None = 1280,
        transformer_layers_per_block: int | Sequence[int] = 1,
        attention_head_dim: int | Sequence[int] = 8,
        use_linear_projection: bool = False,
        class_embed_type: str | None = None,
        addition_embed_type: str | None = None,
        addition_time_embed_dim: int | None = None,
        num_class_embeds: int | None = None,
        projection_class_embeddings_input_dim: int | None = None,
        gradient_checkpointing: bool = False,
    ) -> None:
        super().__init__()
        width, temb = block_out_channels[0], block_out_channels[0] * 4
        if cross_attention_dim is None and projection_class_embeddings_input_dim is None:
            class_embed_type = None  # nothing is told: there is nothing to project
        self.in_channels, self.out_channels = in_channels, out_channels
        self.gradient_checkpointing, self.dropout = gradient_checkpointing, dropout
        self.class_embed_type, self.addition_time_embed_dim = class_embed_type, addition_time_embed_dim
        self.sinusoidal = {"flip_sin_to_cos": flip_sin_to_cos, "freq_shift": freq_shift}
        self.conv_in = nn.Conv2d(in_channels, width, 3, padding=1)
        self.time_embedding = TimestepEmbedding(width, temb)
        self.class_embedding = self._class_embedding(temb, num_class_embeds, projection_class_embeddings_input_dim)
        self.add_embedding = self._add_embedding(temb, addition_embed_type, projection_class_embeddings_input_dim)
        self.needs = self._needs(cross_attention_dim is not None)
        self.seats = (*self.needs, *(("context_mask",) if "context" in self.needs else ()), "concat")

        shapes = _level_shapes(
            block_out_channels,
            layers_per_block=layers_per_block,
            attention_head_dim=attention_head_dim,
            transformer_layers_per_block=transformer_layers_per_block,
            only_cross_attention=only_cross_attention,
            down_block_types=[DOWN_BLOCKS[_one_of("a down_block_type", k, DOWN_BLOCKS)] for k in down_block_types],
            up_block_types=[UP_BLOCKS[_one_of("an up_block_type", k, UP_BLOCKS)] for k in reversed(up_block_types)],
        )
        maker = LevelMaker(temb, norm_num_groups, norm_eps, dropout, cross_attention_dim, use_linear_projection)
        self.down_blocks, skips = maker.down(shapes)
        mid_attends = MID_BLOCKS[_one_of("mid_block_type", mid_block_type, MID_BLOCKS)]
        self.mid_block = None if mid_attends is None else maker.mid(shapes[-1], mid_attends)
        self.up_blocks = maker.up(shapes, skips)
        self.conv_norm_out = GroupNorm(norm_num_groups, width, norm_eps, silu=True)
        self.conv_out = nn.Conv2d(width, out_channels, 3, padding=1)
        nn.init.zeros_(self.conv_out.weight)  # predicts zero at first (Ho et al. 2020)
        nn.init.zeros_(self.conv_out.bias)
        self.to(memory_format=torch.channels_last)

    @classmethod
    def from_diffusers(cls, config: Mapping[str, Any]) -> Self:
        """The network that the content of a diffusers config.json describes.

        Raises:
            ConfigError: for the config of another class, a key that diffusers' class does not have, or a value that
                asks for what is not built here.
        """
        kind = config.get("_class_name", _DIFFUSERS_CLASS)
        if kind != _DIFFUSERS_CLASS:
            raise ConfigError(f"model: the config is of a {kind}, not of a {_DIFFUSERS_CLASS}")
        arguments = inspect.signature(cls).parameters.keys() - {"gradient_checkpointing"}
        known, values = {*arguments, *FIXED, *_SAYS_NOTHING}, {}
        for key, value in config.items():
            if not key.startswith("_") and key not in known:
                near = "".join(f"; did you mean {name!r}?" for name in get_close_matches(key, known, 1))
                raise ConfigError(f"model: unknown key {key!r}{near}")
            if value != FIXED.get(key, value):
                raise ConfigError(f"model: {key} is {value!r} there; only {FIXED[key]!r} is built here")
            if key in arguments:
                values[key] = value
        width = values.get("cross_attention_dim")
        if isinstance(width, Sequence):  # one for each level
            if len(set(width)) != 1:
                raise ConfigError(f"model: cross_attention_dim is {width!r} there; only one for all is built here")
            values["cross_attention_dim"] = width[0]
        return cls(**values)

    def _class_embedding(self, temb: int, num_classes: int | None, width: int | None) -> nn.Module | None:
        kind = _one_of("class_embed_type", self.class_embed_type, CLASS_EMBEDDINGS)
        if kind == "projection":
            if width is None:
                raise ConfigError("model: class_embed_type=projection needs projection_class_embeddings_input_dim")
            return TimestepEmbedding(width, temb)
        if kind == "timestep":
            return TimestepEmbedding(self.time_embedding.linear_1.in_features, temb)
        if kind == "identity":
            return nn.Identity()
        return None if num_classes is None else nn.Embedding(num_classes, temb)

    def _add_embedding(self, temb: int, kind: str | None, width: int | None) -> nn.Module | None:
        if _one_of("addition_embed_type", kind, ADDITION_EMBEDDINGS) is None:
            return None
        if width is None or self.addition_time_embed_dim is None:
            raise ConfigError(
                "model: addition_embed_type=text_time needs projection_class_embeddings_input_dim and "
                "addition_time_embed_dim"
            )
        return TimestepEmbedding(width, temb)

    def _needs(self, has_context: bool) -> tuple[str, ...]:
        """The conditions that it cannot do without."""
        is_pooled = self.class_embed_type == "projection"
        found = {
            "context": has_context,
            "class_labels": self.class_embedding is not None and not is_pooled,
            "pooled": is_pooled or self.add_embedding is not None,
            "sizes": self.add_embedding is not None,
        }
        return tuple(name for name, is_needed in found.items() if is_needed)

    def forward(self, x: Tensor, time: Tensor, cond: Conditioning) -> Tensor:
        """x (B, C, h, w), time (B,) as the network counts it, cond -> (B, out_channels, h, w).

        Raises:
            ConfigError: for a condition that the model has no seat for, needs and does not get, or of the wrong width.
        """
        x = self._input(x, cond)
        told = (F.silu(self._embedding(time, cond, x.dtype)), cond.get("context"), cond.get("context_mask"))
        x = self.conv_in(x.contiguous(memory_format=torch.channels_last))
        skips = [x]
        for level in self.down_blocks:
            for j in range(len(level.resnets)):
                x = self._block(level, j, x, None, *told)
                skips.append(x)
            if hasattr(level, "downsamplers"):
                x = level.downsamplers[0](x)
                skips.append(x)
        for j in range(len(self.mid_block.resnets) if self.mid_block else 0):
            x = self._block(self.mid_block, j, x, None, *told)
        for level in self.up_blocks:
            for j in range(len(level.resnets)):
                x = self._block(level, j, x, skips.pop(), *told)
            if hasattr(level, "upsamplers"):
                x = level.upsamplers[0](x, skips[-1].shape[2:])
        return self.conv_out(self.conv_norm_out(x))

    def _block(self, level: Level, *inputs: Any) -> Tensor:  # noqa: ANN401 as Level.forward takes them
        if self.gradient_checkpointing and torch.is_grad_enabled():
            return checkpoint(level, *inputs, use_reentrant=False, preserve_rng_state=self.dropout > 0)
        return level(*inputs)

    def _input(self, x: Tensor, cond: Conditioning) -> Tensor:
        """x_t and what is joined to it, once it is sure that the conditioning is one for this model."""
        known = (*self.seats, "pooled") if "context" in cond else self.seats  # a pooled context says nothing of its own
        if unknown := cond.keys() - known:
            raise ConfigError(
                f"model: no seat for the condition {', '.join(sorted(unknown))}; there are {', '.join(self.seats)}"
            )
        if missing := self.needs - cond.keys():
            raise ConfigError(f"model: it needs the condition {', '.join(sorted(missing))} and is told {[*cond]}")
        if "concat" in cond:
            x = torch.cat((x, cond["concat"].to(x.dtype)), dim=1)
        if x.shape[1] != self.in_channels:
            raise ConfigError(f"model: in_channels is {self.in_channels}, but x_t with what joins it has {x.shape[1]}")
        return x

    def _embedding(self, time: Tensor, cond: Conditioning, dtype: torch.dtype) -> Tensor:
        """The time and what is added to it, (B, T)."""
        width = self.time_embedding.linear_1.in_features
        temb = self.time_embedding(sinusoidal(time, width, **self.sinusoidal).to(dtype))
        if self.class_embedding is not None:
            said = cond["pooled" if self.class_embed_type == "projection" else "class_labels"]
            if self.class_embed_type == "timestep":
                said = sinusoidal(said, width, **self.sinusoidal)
            is_table = isinstance(self.class_embedding, nn.Embedding)
            temb = temb + self.class_embedding(said if is_table else said.to(dtype))
        if self.add_embedding is not None:
            sizes = sinusoidal(cond["sizes"].flatten(), self.addition_time_embed_dim, **self.sinusoidal)
            sizes = sizes.unflatten(0, cond["sizes"].shape).flatten(1)  # (B, 6 addition_time_embed_dim)
            temb = temb + self.add_embedding(torch.cat((cond["pooled"].to(dtype), sizes.to(dtype)), dim=1))
        return temb


def _one_of(name: str, value: str | None, known: Collection[str | None]) -> str | None:
    if value not in known:
        raise ConfigError(f"model: {name} is one of {', '.join(kind or 'null' for kind in known)}, not {value!r}")
    return value


def _level_shapes(widths: Sequence[int], **per_level: Any) -> list[LevelShape]:  # noqa: ANN401 one value, or a list
    lists = [_per_level(name, value, len(widths)) for name, value in per_level.items()]
    return [LevelShape(*values) for values in zip(widths, *lists)]


def _per_level(name: str, value: Any, levels: int) -> list[Any]:  # noqa: ANN401 one value, or a list of them
    values = list(value) if isinstance(value, Sequence) else [value] * levels
    if len(values) != levels:
        raise ConfigError(f"model: {levels} block_out_channels need {levels} of {name}, not {len(values)}")
    return values
