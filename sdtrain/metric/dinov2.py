"""DINOv2 (Oquab et al. 2023) from a local file: its class token's features, for the Frechet distance FD-DINOv2.

A plain vision transformer with scaled residuals. Parameter names are those of the public files.
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn.functional import gelu, scaled_dot_product_attention

from sdtrain.errors import ConfigError
from sdtrain.metric.extractor import find_resize, load_exactly, read_weights, sha256_of

SIDE, PATCH, HEAD = 224, 14, 64
TRAINED = 518  # the side, in pixels, that the position embeddings of the public files are for
WANTED = (
    "dinov2_vitl14_pretrain.pth (https://dl.fbaipublicfiles.com/dinov2/dinov2_vitl14/dinov2_vitl14_pretrain.pth, "
    "1.2 GB) or dinov2_vitb14_pretrain.pth"
)
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


class _Attention(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.num_heads = width // HEAD
        self.qkv, self.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        parts = self.qkv(x).unflatten(2, (3, self.num_heads, HEAD))  # (B, L, 3, heads, 64)
        q, k, v = parts.permute(2, 0, 3, 1, 4)  # each (B, heads, L, 64)
        return self.proj(scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))  # (B, L, D)


class _MLP(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(gelu(self.fc1(x)))


class _Scale(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.gamma


class _Block(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width, eps=1e-6), nn.LayerNorm(width, eps=1e-6)
        self.attn, self.mlp = _Attention(width), _MLP(width)
        self.ls1, self.ls2 = _Scale(width), _Scale(width)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.ls1(self.attn(self.norm1(x)))
        return x + self.ls2(self.mlp(self.norm2(x)))


class _Patches(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.proj = nn.Conv2d(3, width, PATCH, stride=PATCH)

    def forward(self, x: Tensor) -> Tensor:
        return self.proj(x).flatten(2).transpose(1, 2)  # (B, L, D)


class VisionTransformer(nn.Module):
    """Normalised pictures (B, 3, 224, 224) -> the class token's features (B, D)."""

    def __init__(self, width: int, depth: int) -> None:
        super().__init__()
        self.cls_token = nn.Parameter(torch.zeros(1, 1, width))
        self.pos_embed = nn.Parameter(torch.zeros(1, 1 + (TRAINED // PATCH) ** 2, width))
        self.mask_token = nn.Parameter(torch.zeros(1, width))  # of the files; only their training reads it
        self.patch_embed = _Patches(width)
        self.blocks = nn.ModuleList([_Block(width) for _ in range(depth)])
        self.norm = nn.LayerNorm(width, eps=1e-6)

    def forward(self, x: Tensor) -> Tensor:
        patches = self.patch_embed(x)
        x = torch.cat([self.cls_token.expand(len(x), -1, -1), patches], dim=1) + self._positions(SIDE // PATCH)
        for block in self.blocks:
            x = block(x)
        return self.norm(x)[:, 0]

    def _positions(self, side: int) -> Tensor:
        """The embeddings at another number of patches; the offset of 0.1 is their code's, against rounding."""
        trained = TRAINED // PATCH
        grid = self.pos_embed[:, 1:].unflatten(1, (trained, trained)).permute(0, 3, 1, 2)  # (1, D, 37, 37)
        scale = (side + 0.1) / trained
        grid = nn.functional.interpolate(grid, scale_factor=(scale, scale), mode="bicubic")  # (1, D, side, side)
        return torch.cat([self.pos_embed[:, :1], grid.flatten(2).transpose(1, 2)], dim=1)  # (1, 1 + side^2, D)


class DinoV2(nn.Module):
    """Features of ViT-B/14 or ViT-L/14, whichever the file holds.

    Args:
        weights: the public file.
        resize: by name, see extractor.py.

    Raises:
        ConfigError: naming a file that is not there or does not fit.
    """

    def __init__(self, weights: str, resize: str = "bicubic_antialiased") -> None:
        super().__init__()
        self.resize = resize
        self._resized = find_resize(resize, "dinov2.resize")
        state = read_weights(weights, "dinov2.weights", WANTED)
        if "cls_token" not in state or "register_tokens" in state:
            raise ConfigError(f"dinov2.weights: {weights} does not fit: it wants {WANTED}, without registers")
        self.num_features = state["cls_token"].shape[-1]
        depth = 1 + max((int(name.split(".")[1]) for name in state if name.startswith("blocks.")), default=-1)
        self.network = VisionTransformer(self.num_features, depth)
        load_exactly(self.network, state, weights, "dinov2.weights")
        self.register_buffer("mean", torch.tensor(MEAN)[:, None, None], persistent=False)
        self.register_buffer("std", torch.tensor(STD)[:, None, None], persistent=False)
        self.requires_grad_(False)
        self.eval()
        self.identity = {"network": "dinov2", "sha256": sha256_of(Path(weights))}

    @torch.no_grad()
    def forward(self, pictures: Tensor) -> Tensor:
        """Pictures (B, 3, H, W), uint8 -> (B, D)."""
        x = self._resized(pictures.float(), SIDE).clamp(0, 255) / 255
        return self.network((x - self.mean) / self.std)
