"""The levels of a U-Net: what stands at one resolution, on the way down, in the middle, and on the way up."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from sdtrain.layer.attention import SpatialTransformer
from sdtrain.layer.resnet import Downsample, ResnetBlock, Upsample


class Level(nn.Module):
    """One resolution: residual blocks, each with a transformer after it where there is one, then resampling."""

    def __init__(self, resnets: list[ResnetBlock], attentions: list[SpatialTransformer]) -> None:
        super().__init__()
        self.resnets, self.attentions = nn.ModuleList(resnets), nn.ModuleList(attentions)

    def forward(
        self, j: int, x: Tensor, skip: Tensor | None, temb: Tensor, context: Tensor | None, mask: Tensor | None
    ) -> Tensor:
        """Block j. `skip` is joined here, so that a checkpointed block keeps the parts, not the whole as well."""
        x = self.resnets[j](x if skip is None else torch.cat((x, skip), dim=1), temb)
        return self.attentions[j](x, context, mask) if j < len(self.attentions) else x


class LevelShape(NamedTuple):
    """What the levels differ in."""

    width: int
    num_layers: int
    num_heads: int
    num_transformer_layers: int
    only_cross_attention: bool
    attends_down: bool
    attends_up: bool


class LevelMaker(NamedTuple):
    """What the levels have in common; makes them."""

    time_embed_dim: int
    groups: int
    eps: float
    dropout: float
    cross_attention_dim: int | None
    linear_projection: bool

    def down(self, shapes: Sequence[LevelShape]) -> tuple[nn.ModuleList, list[int]]:
        """The levels on the way down, and the widths of what they leave for the way up."""
        levels, skips = nn.ModuleList(), [shapes[0].width]
        for shape in shapes:
            inputs = [skips[-1]] + [shape.width] * (shape.num_layers - 1)
            level = self._level(shape, inputs, len(inputs) if shape.attends_down else 0)
            skips += [shape.width] * shape.num_layers
            if shape is not shapes[-1]:
                level.downsamplers = nn.ModuleList([Downsample(shape.width)])
                skips.append(shape.width)
            levels.append(level)
        return levels, skips

    def mid(self, shape: LevelShape, attends: bool) -> Level:
        """Two residual blocks and a transformer between them, or one block alone."""
        shape = shape._replace(only_cross_attention=False)
        return self._level(shape, [shape.width] * (2 if attends else 1), int(attends))

    def up(self, shapes: Sequence[LevelShape], skips: Sequence[int]) -> nn.ModuleList:
        """The levels on the way up, the lowest first; each block is joined by the last of `skips` that is left."""
        levels, previous, skips = nn.ModuleList(), shapes[-1].width, list(skips)
        for shape in reversed(shapes):
            inputs = [width + skips.pop() for width in [previous] + [shape.width] * shape.num_layers]
            level = self._level(shape, inputs, len(inputs) if shape.attends_up else 0)
            if shape is not shapes[0]:
                level.upsamplers = nn.ModuleList([Upsample(shape.width)])
            levels.append(level)
            previous = shape.width
        return levels

    def _level(self, shape: LevelShape, inputs: Sequence[int], num_transformers: int) -> Level:
        transformers = [self._transformer(shape) for _ in range(num_transformers)]
        return Level([self._resnet(n, shape.width) for n in inputs], transformers)

    def _resnet(self, inputs: int, width: int) -> ResnetBlock:
        return ResnetBlock(
            inputs,
            width,
            time_embed_dim=self.time_embed_dim,
            groups=self.groups,
            eps=self.eps,
            dropout=self.dropout,
            zero_init=True,
        )

    def _transformer(self, shape: LevelShape) -> SpatialTransformer:
        return SpatialTransformer(
            shape.width,
            num_heads=shape.num_heads,
            num_layers=shape.num_transformer_layers,
            cross_attention_dim=self.cross_attention_dim,
            groups=self.groups,
            linear_projection=self.linear_projection,
            only_cross_attention=shape.only_cross_attention,
        )
