"""The Inception v3 of the FID (Szegedy et al. 2016), as its 2015 TensorFlow graph computes it, from a local file.

That graph differs from torchvision's network in its average pools, which leave the padding out, in a maximum pool in
the last block, and in its 1008 classes. Parameter names are those of the public file.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn.functional import avg_pool2d, max_pool2d

from sdtrain.metric.extractor import find_resize, load_exactly, read_weights, sha256_of

SIDE = 299
NUM_CLASSES = 1008
WANTED = (
    "pt_inception-2015-12-05-6726825d.pth (https://github.com/mseitzer/pytorch-fid/releases/download/fid_weights/"
    "pt_inception-2015-12-05-6726825d.pth, 95 MB)"
)

# A convolution: width, kernel (height, width), stride. Strided ones and 1x1 have no padding, others keep the size.
Conv = tuple[int, tuple[int, int], int]
POINT, WIDE, TALL, SQUARE = (1, 1), (1, 7), (7, 1), (3, 3)


class _ConvNorm(nn.Module):
    def __init__(self, in_channels: int, width: int, kernel: tuple[int, int], stride: int = 1, is_padded: bool = True):
        super().__init__()
        padding = (kernel[0] // 2, kernel[1] // 2) if is_padded and stride == 1 else (0, 0)
        self.conv = nn.Conv2d(in_channels, width, kernel, stride, padding, bias=False)
        self.bn = nn.BatchNorm2d(width, eps=0.001)

    def forward(self, x: Tensor) -> Tensor:
        return self.bn(self.conv(x)).relu()


class _Mixed(nn.Module):
    """Branches of convolutions side by side, joined with a pool; letters after a branch's last number fork it."""

    def __init__(self, in_channels: int, branches: Mapping[str, Sequence[Conv]], pool: str) -> None:
        super().__init__()
        self.pool = pool
        self.chains: list[list[str]] = []
        self.num_channels = 0
        for branch, convs in branches.items():
            name, _, letters = branch.partition("|")
            num_straight = len(convs) - len(letters)
            names = [f"{name}_{i + 1}" for i in range(num_straight)] if len(convs) > 1 else [name]
            names += [f"{name}_{num_straight + 1}{letter}" for letter in letters]
            width = in_channels
            for i, (own, (out, kernel, stride)) in enumerate(zip(names, convs, strict=True)):
                self.add_module(own, _ConvNorm(width, out, kernel, stride))
                if i < num_straight:
                    width = out
            self.chains.append(names)
            self.num_channels += sum(conv[0] for conv in convs[num_straight:]) if letters else convs[-1][0]
        if "branch_pool" not in branches:
            self.num_channels += in_channels

    def forward(self, x: Tensor) -> Tensor:
        found = []
        for names in self.chains:
            out = _pooled(x, self.pool) if names == ["branch_pool"] else x
            for name in names:
                if name[-1] in "ab":
                    found.append(self.get_submodule(name)(out))
                else:
                    out = self.get_submodule(name)(out)
            if names[-1][-1] not in "ab":
                found.append(out)
        if ["branch_pool"] not in self.chains:
            found.append(_pooled(x, self.pool))
        return torch.cat(found, dim=1)


def _pooled(x: Tensor, pool: str) -> Tensor:
    if pool == "average":
        return avg_pool2d(x, 3, stride=1, padding=1, count_include_pad=False)
    return max_pool2d(x, 3, stride=1, padding=1) if pool == "maximum" else max_pool2d(x, 3, stride=2)


def _block_35(pool_width: int) -> dict[str, list[Conv]]:
    return {
        "branch1x1": [(64, POINT, 1)],
        "branch5x5": [(48, POINT, 1), (64, (5, 5), 1)],
        "branch3x3dbl": [(64, POINT, 1), (96, SQUARE, 1), (96, SQUARE, 1)],
        "branch_pool": [(pool_width, POINT, 1)],
    }


def _block_17(width: int) -> dict[str, list[Conv]]:
    return {
        "branch1x1": [(192, POINT, 1)],
        "branch7x7": [(width, POINT, 1), (width, WIDE, 1), (192, TALL, 1)],
        "branch7x7dbl": [(width, POINT, 1), (width, TALL, 1), (width, WIDE, 1), (width, TALL, 1), (192, WIDE, 1)],
        "branch_pool": [(192, POINT, 1)],
    }


_BLOCK_8 = {
    "branch1x1": [(320, POINT, 1)],
    "branch3x3|ab": [(384, POINT, 1), (384, (1, 3), 1), (384, (3, 1), 1)],
    "branch3x3dbl|ab": [(448, POINT, 1), (384, SQUARE, 1), (384, (1, 3), 1), (384, (3, 1), 1)],
    "branch_pool": [(192, POINT, 1)],
}
_DOWN_17 = {
    "branch3x3": [(384, SQUARE, 2)],
    "branch3x3dbl": [(64, POINT, 1), (96, SQUARE, 1), (96, SQUARE, 2)],
}
_DOWN_8 = {
    "branch3x3": [(192, POINT, 1), (320, SQUARE, 2)],
    "branch7x7x3": [(192, POINT, 1), (192, WIDE, 1), (192, TALL, 1), (192, SQUARE, 2)],
}
_MIXED = (
    ("Mixed_5b", _block_35(32), "average"),
    ("Mixed_5c", _block_35(64), "average"),
    ("Mixed_5d", _block_35(64), "average"),
    ("Mixed_6a", _DOWN_17, "down"),
    ("Mixed_6b", _block_17(128), "average"),
    ("Mixed_6c", _block_17(160), "average"),
    ("Mixed_6d", _block_17(160), "average"),
    ("Mixed_6e", _block_17(192), "average"),
    ("Mixed_7a", _DOWN_8, "down"),
    ("Mixed_7b", _BLOCK_8, "average"),
    ("Mixed_7c", _BLOCK_8, "maximum"),
)


class InceptionV3(nn.Module):
    """The network alone: pictures (B, 3, 299, 299) on [-1, 1] -> the 2048 pooled features."""

    def __init__(self) -> None:
        super().__init__()
        self.Conv2d_1a_3x3 = _ConvNorm(3, 32, SQUARE, stride=2)
        self.Conv2d_2a_3x3 = _ConvNorm(32, 32, SQUARE, is_padded=False)
        self.Conv2d_2b_3x3 = _ConvNorm(32, 64, SQUARE)
        self.Conv2d_3b_1x1 = _ConvNorm(64, 80, POINT)
        self.Conv2d_4a_3x3 = _ConvNorm(80, 192, SQUARE, is_padded=False)
        channels = 192
        for name, branches, pool in _MIXED:
            block = _Mixed(channels, branches, pool)
            self.add_module(name, block)
            channels = block.num_channels
        self.fc = nn.Linear(channels, NUM_CLASSES)
        self.num_features = channels

    def forward(self, x: Tensor) -> Tensor:
        x = self.Conv2d_2b_3x3(self.Conv2d_2a_3x3(self.Conv2d_1a_3x3(x)))
        x = self.Conv2d_4a_3x3(self.Conv2d_3b_1x1(max_pool2d(x, 3, stride=2)))
        x = max_pool2d(x, 3, stride=2)
        for name, _, _ in _MIXED:
            x = self.get_submodule(name)(x)
        return x.mean(dim=(2, 3))  # (B, 2048)


class Inception(nn.Module):
    """Features and logits of the FID's network.

    Args:
        weights: the public file.
        resize: `legacy_bilinear` as the original graph and ADM's evaluator, `bilinear` as pytorch-fid,
            `bicubic_antialiased` as clean-fid. Figures of different ones are not comparable.

    Raises:
        ConfigError: naming a file that is not there or does not fit.
    """

    def __init__(self, weights: str, resize: str = "legacy_bilinear") -> None:
        super().__init__()
        self.resize = resize
        self._resized = find_resize(resize, "inception.resize")
        state = read_weights(weights, "inception.weights", WANTED)
        self.network = InceptionV3()
        load_exactly(self.network, state, weights, "inception.weights")
        self.num_features = self.network.num_features
        self.requires_grad_(False)
        self.eval()
        self.identity = {"network": "inception_v3_2015", "sha256": sha256_of(Path(weights))}

    @torch.no_grad()
    def forward(self, pictures: Tensor) -> Tensor:
        """Pictures (B, 3, H, W), uint8 -> (B, 2048)."""
        x = self._resized(pictures.float(), SIDE)
        x = x / 127.5 - 1 if self.resize == "bilinear" else (x - 128) / 128  # as pytorch-fid; as the graph
        return self.network(x)

    def logits(self, features: Tensor) -> Tensor:
        """(B, 2048) -> (B, 1008), without their bias, as the inception score's code has them."""
        return features @ self.network.fc.weight.T.to(features)
