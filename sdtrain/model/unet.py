"""The U-Net of latent diffusion (Rombach et al. 2022): residual blocks, spatial transformers, skip connections.

Parameter names and configuration keys are those of diffusers' `UNet2DConditionModel`, so weights move by copying files.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sdtrain.contracts import Conditioning
from sdtrain.errors import ConfigError
from sdtrain.layer.attention import SpatialTransformer
from sdtrain.layer.embedding import TimestepEmbedding, sinusoidal
from sdtrain.layer.norm import GroupNorm
from sdtrain.layer.resnet import Downsample, ResnetBlock, Upsample

ATTENTION_BLOCKS = ("CrossAttnDownBlock2D", "CrossAttnUpBlock2D")
PLAIN_BLOCKS = ("DownBlock2D", "UpBlock2D")


class _Level(nn.Module):
    """One resolution: residual blocks, a transformer after each where the level has attention, then resampling."""

    def __init__(self, resnets: list[nn.Module], attentions: list[nn.Module]) -> None:
        super().__init__()
        self.resnets = nn.ModuleList(resnets)
        if attentions:
            self.attentions = nn.ModuleList(attentions)

    def step(self, j: int, x: Tensor, temb: Tensor, context: Tensor | None, mask: Tensor | None) -> Tensor:
        x = self.resnets[j](x, temb)
        return self.attentions[j](x, context, mask) if hasattr(self, "attentions") else x


class UNet(nn.Module):
    """Predicts noise, velocity or data from a noised latent, the time, and a conditioning.

    Args:
        in_channels: of x_t plus whatever `concat` joins to it (9 for inpainting, 7 for upscaling, 8 for editing).
        out_channels: as the latent; twice that for a learned variance.
        attention_head_dim: as in diffusers, the *number* of heads of each level (its configuration misnames it); a list
            for one a level.
        use_linear_projection: SD 2.x and XL; SD 1.x has 1x1 convolutions.
        num_class_embeds: a table of class labels, added to the timestep embedding.
        class_embed_type: "projection" adds a projected `pooled` vector of projection_class_embeddings_input_dim.

    Raises:
        ConfigError: for a block type it does not have, or lists of different lengths.
    """

    def __init__(  # noqa: PLR0913 the keys of diffusers' configuration
        self,
        in_channels: int = 4,
        out_channels: int = 4,
        down_block_types: Sequence[str] = ("CrossAttnDownBlock2D",) * 3 + ("DownBlock2D",),
        up_block_types: Sequence[str] = ("UpBlock2D",) + ("CrossAttnUpBlock2D",) * 3,
        block_out_channels: Sequence[int] = (320, 640, 1280, 1280),
        layers_per_block: int = 2,
        transformer_layers_per_block: int = 1,
        cross_attention_dim: int | None = 1280,
        attention_head_dim: int | Sequence[int] = 8,
        use_linear_projection: bool = False,
        norm_num_groups: int = 32,
        norm_eps: float = 1e-5,
        dropout: float = 0.0,
        num_class_embeds: int | None = None,
        class_embed_type: str | None = None,
        projection_class_embeddings_input_dim: int | None = None,
    ) -> None:
        super().__init__()
        levels = len(block_out_channels)
        if len(down_block_types) != levels or len(up_block_types) != levels:
            raise ConfigError(
                f"model: {levels} block_out_channels need {levels} down_block_types and up_block_types, "
                f"not {len(down_block_types)} and {len(up_block_types)}"
            )
        for kind in (*down_block_types, *up_block_types):
            if kind not in ATTENTION_BLOCKS + PLAIN_BLOCKS:
                raise ConfigError(
                    f"model: no block type {kind!r}; there are {', '.join(ATTENTION_BLOCKS + PLAIN_BLOCKS)}"
                )
        self.in_channels, self.out_channels = in_channels, out_channels
        widths = list(block_out_channels)
        if not isinstance(attention_head_dim, int) and len(attention_head_dim) != levels:
            raise ConfigError(
                f"model: {levels} levels need {levels} of attention_head_dim, not {len(attention_head_dim)}"
            )
        heads = [attention_head_dim] * levels if isinstance(attention_head_dim, int) else list(attention_head_dim)
        self.time_width = widths[0]
        temb = widths[0] * 4

        def resnet(inputs: int, outputs: int) -> ResnetBlock:
            return ResnetBlock(
                inputs,
                outputs,
                time_embed_dim=temb,
                groups=norm_num_groups,
                eps=norm_eps,
                dropout=dropout,
                zero_init=True,
            )

        def transformer(level: int) -> SpatialTransformer:
            return SpatialTransformer(
                widths[level],
                num_heads=heads[level],
                head_dim=widths[level] // heads[level],
                num_layers=transformer_layers_per_block,
                cross_attention_dim=cross_attention_dim,
                groups=norm_num_groups,
                linear_projection=use_linear_projection,
            )

        self.conv_in = nn.Conv2d(in_channels, widths[0], 3, padding=1)
        self.time_embedding = TimestepEmbedding(widths[0], temb)
        if cross_attention_dim is None and projection_class_embeddings_input_dim is None:
            class_embed_type = None  # nothing is told: there is nothing to project
        self.class_embedding = self._class_embedding(
            temb, num_class_embeds, class_embed_type, projection_class_embeddings_input_dim
        )
        labels = "class_labels" if class_embed_type is None else "pooled"
        self.seats = ("context", "context_mask", "concat") + ((labels,) if self.class_embedding is not None else ())
        self.down_blocks, skips, previous = nn.ModuleList(), [widths[0]], widths[0]
        for i, width in enumerate(widths):
            inputs = [previous] + [width] * (layers_per_block - 1)
            attended = down_block_types[i] in ATTENTION_BLOCKS
            level = _Level([resnet(n, width) for n in inputs], [transformer(i) for _ in inputs] if attended else [])
            skips += [width] * layers_per_block
            if i < levels - 1:
                level.downsamplers = nn.ModuleList([Downsample(width)])
                skips.append(width)
            self.down_blocks.append(level)
            previous = width
        self.mid_block = _Level([resnet(widths[-1], widths[-1]) for _ in range(2)], [transformer(levels - 1)])
        self.up_blocks = nn.ModuleList()
        for i, width in reversed(list(enumerate(widths))):
            resnets = []
            for _ in range(layers_per_block + 1):
                resnets.append(resnet(previous + skips.pop(), width))
                previous = width
            attended = up_block_types[levels - 1 - i] in ATTENTION_BLOCKS
            level = _Level(resnets, [transformer(i) for _ in resnets] if attended else [])
            if i > 0:
                level.upsamplers = nn.ModuleList([Upsample(width)])
            self.up_blocks.append(level)
        self.conv_norm_out = GroupNorm(norm_num_groups, widths[0], norm_eps)
        self.conv_out = nn.Conv2d(widths[0], out_channels, 3, padding=1)
        nn.init.zeros_(self.conv_out.weight)  # predicts zero at first (Ho et al. 2020)
        nn.init.zeros_(self.conv_out.bias)
        self.to(memory_format=torch.channels_last)

    @staticmethod
    def _class_embedding(temb: int, num_classes: int | None, kind: str | None, width: int | None) -> nn.Module | None:
        if kind == "projection":
            if width is None:
                raise ConfigError("model: class_embed_type=projection needs projection_class_embeddings_input_dim")
            return TimestepEmbedding(width, temb)
        if kind is not None:
            raise ConfigError(f"model: class_embed_type is null or 'projection', not {kind!r}")
        return None if num_classes is None else nn.Embedding(num_classes, temb)

    def forward(self, x: Tensor, time: Tensor, cond: Conditioning) -> Tensor:
        """x (B, C, h, w), time (B,) as the network counts it, cond -> (B, out_channels, h, w).

        Raises:
            ConfigError: for a condition that the model has no seat for.
        """
        known = (*self.seats, "pooled") if "context" in cond else self.seats  # a pooled context says nothing of its own
        if unknown := cond.keys() - known:
            raise ConfigError(
                f"model: no seat for the condition {', '.join(sorted(unknown))}; there are {', '.join(self.seats)}"
            )
        context, mask = cond.get("context"), cond.get("context_mask")
        if "concat" in cond:
            x = torch.cat((x, cond["concat"].to(x.dtype)), dim=1)
        temb = self.time_embedding(sinusoidal(time, self.time_width).to(x.dtype))
        if self.class_embedding is not None:
            table = isinstance(self.class_embedding, nn.Embedding)
            temb = temb + self.class_embedding(cond["class_labels"] if table else cond["pooled"].to(x.dtype))
        temb = F.silu(temb)
        x = self.conv_in(x.contiguous(memory_format=torch.channels_last))
        skips = [x]
        for level in self.down_blocks:
            for j in range(len(level.resnets)):
                x = level.step(j, x, temb, context, mask)
                skips.append(x)
            if hasattr(level, "downsamplers"):
                x = level.downsamplers[0](x)
                skips.append(x)
        mid = self.mid_block
        x = mid.resnets[1](mid.attentions[0](mid.resnets[0](x, temb), context, mask), temb)
        for level in self.up_blocks:
            for j in range(len(level.resnets)):
                x = level.step(j, torch.cat((x, skips.pop()), dim=1), temb, context, mask)
            if hasattr(level, "upsamplers"):
                x = level.upsamplers[0](x, skips[-1].shape[2:])
        return self.conv_out(F.silu(self.conv_norm_out(x)))
