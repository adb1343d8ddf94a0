"""Random masks to learn inpainting from: boxes, brush strokes, or everything."""

from __future__ import annotations

import torch
from torch import Tensor

from sdtrain.ops.random import Draw

_NUM_BOXES, _NUM_POINTS = 3, 7


def draw_masks(draw: Draw, height: int, width: int, whole: float = 0.25) -> Tensor:
    """(B, 1, H, W) float32, 1 where to paint: a sample's boxes or strokes (as in Suvorov et al. 2022).

    Args:
        whole: share of masks that cover everything, so that the model also paints from nothing (25 % in SD's own
            inpainting models).
    """
    device = draw.sample_id.device
    y = (torch.arange(height, device=device) + 0.5) / height
    x = (torch.arange(width, device=device) + 0.5) / width
    kind = draw.uniform("mask_kind")[:, None, None]  # (B, 1, 1)
    drawn = torch.where(kind < (1 + whole) / 2, _boxes(draw, y, x), _strokes(draw, y, x))
    return (drawn | (kind < whole)).float()[:, None]  # (B, 1, H, W)


def _boxes(draw: Draw, y: Tensor, x: Tensor) -> Tensor:
    """(B, H, W) bool: one to three boxes of a tenth to a half of the picture's sides."""
    u = draw.uniform("mask_boxes", (_NUM_BOXES, 4))  # (B, N, 4)
    size = 0.1 + 0.4 * u[..., :2]
    low = u[..., 2:] * (1 - size)
    there = (draw.uniform("mask_num_boxes", (1,)) * _NUM_BOXES) >= torch.arange(_NUM_BOXES, device=u.device)  # (B, N)
    low, high = low[..., None], (low + size)[..., None]  # (B, N, 2, 1)
    rows = (y >= low[:, :, 0]) & (y < high[:, :, 0])  # (B, N, H)
    columns = (x >= low[:, :, 1]) & (x < high[:, :, 1]) & there[..., None]  # (B, N, W)
    return (rows[..., :, None] & columns[..., None, :]).any(dim=1)


def _strokes(draw: Draw, y: Tensor, x: Tensor) -> Tensor:
    """(B, H, W) bool: a line through random points, drawn with a round brush."""
    points = draw.uniform("mask_points", (_NUM_POINTS, 2))  # (B, N, 2)
    radius = (0.02 + 0.08 * draw.uniform("mask_brush"))[:, None, None]  # (B, 1, 1)
    covered = torch.zeros((), dtype=torch.bool, device=y.device)
    for start, end in zip(points.unbind(1)[:-1], points.unbind(1)[1:]):
        (dy, dx), (y0, x0) = ((v[:, None, None] for v in pair.unbind(1)) for pair in (end - start, start))
        from_y, from_x = y[:, None] - y0, x - x0  # (B, H, 1), (B, 1, W)
        along = ((from_y * dy + from_x * dx) / (dy**2 + dx**2)).clamp(0, 1)  # (B, H, W)
        covered = covered | ((from_y - along * dy) ** 2 + (from_x - along * dx) ** 2 < radius**2)
    return covered
