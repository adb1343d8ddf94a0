"""Aspect-ratio buckets: the shapes there are, which shape a picture takes, and how samples are dealt into cells of one
shape.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

import numpy as np

from sdtrain.data.order import permutation
from sdtrain.errors import ConfigError

# What stands in the place of a bucket's number where a picture has none.
TOO_LONG, TOO_SMALL = 254, 255
REASONS = {TOO_LONG: "ratio", TOO_SMALL: "upscale"}
_MAX_RATIO = 1000
_MAX_AREA_RATIO = 1.1
_CHUNK_SAMPLES = 1 << 16


class Buckets:
    """Shapes of about the same area, for pictures of every aspect ratio.

    Args:
        base: the side of the square bucket in pixels, or several for several resolutions; a picture takes the largest
            that it covers without being scaled up by more than `max_upscale`. None: data.image_size.
        step: all sides are multiples of this, in pixels.
        max_ratio: of the longer side to the shorter one; longer pictures are left out and counted.
        max_upscale: a picture that would have to be scaled up by more is left out and counted. None: none is.
        cell: so many samples of one shape stand together; a micro-batch is a cell or an equal part of it. None: the
            micro-batch of the run's start (with `sync: group`, that of all ranks together).
        sync: "group" gives all ranks the same shape at the same time, which shapes of unequal area need.
    """

    def __init__(
        self,
        base: int | list[int] | None = None,
        step: int = 64,
        max_ratio: float = 2.0,
        max_upscale: float | None = 1.0,
        cell: int | None = None,
        sync: Literal["none", "group"] = "none",
    ) -> None:
        if sync not in ("none", "group"):
            raise ConfigError(f"data.buckets.sync={sync!r} is none of 'none', 'group'")
        if step < 1 or (cell is not None and cell < 1):
            raise ConfigError("data.buckets: step and cell must be at least 1")
        if not 1 <= max_ratio <= _MAX_RATIO:
            raise ConfigError(f"data.buckets.max_ratio: {max_ratio} is not between 1 and {_MAX_RATIO}")
        bases = list(base) if isinstance(base, list) else [base]
        if not bases or (base is not None and not all(isinstance(one, int) for one in bases)):
            raise ConfigError(f"data.buckets.base: {base!r} is no side in pixels, and no list of them")
        self.base, self.step, self.max_ratio, self.max_upscale = base, step, max_ratio, max_upscale
        self.cell, self.sync = cell, sync

    def table(self, image_size: int) -> Table:
        """The shapes, for a base of `image_size` where none is configured."""
        base = image_size if self.base is None else self.base
        bases = sorted(set(base)) if isinstance(base, list) else [base]
        shapes = [_shapes(base, self.step, self.max_ratio) for base in bases]
        areas = [height * width for group in shapes for height, width in group]
        if self.sync == "none" and max(areas) > _MAX_AREA_RATIO * min(areas):
            raise ConfigError(
                f"data.buckets: the largest of its shapes has {max(areas) / min(areas):.2f} times the area of the "
                "smallest, and ranks would wait for each other; write sync: group, or one base"
            )
        if len(areas) >= TOO_LONG:
            raise ConfigError(f"data.buckets: {len(areas)} shapes are too many; write a larger step")
        return Table(shapes, self.max_ratio, self.max_upscale)

    def cell_of(self, global_batch_size: int, world: int, num_accumulate: int, before: int | None) -> int:
        """The samples of a cell: as configured, else as in the run before, else a micro-batch."""
        parts = num_accumulate * (1 if self.sync == "group" else world)
        return self.cell or before or max(global_batch_size // parts, 1)


def _shapes(base: int, step: int, max_ratio: float) -> list[tuple[int, int]]:
    """(height, width) of every bucket, from the tallest to the widest: nearly base² in area, mirrors included."""
    if base < step or base % step:
        raise ConfigError(f"data.buckets: base {base} is no multiple of step {step}")
    found = set()
    for side in range(step, int(base * max_ratio) + 1, step):
        other = base * base // side // step * step
        if max(side, other) <= max_ratio * min(side, other) and side * other * _MAX_AREA_RATIO >= base * base:
            found |= {(side, other), (other, side)}
    return sorted(found, key=lambda shape: (shape[1] / shape[0], shape))


class Table:
    """The shapes, numbered, smallest base first; and which of them a picture takes."""

    def __init__(self, shapes: list[list[tuple[int, int]]], max_ratio: float, max_upscale: float | None) -> None:
        self._bases, self.max_ratio, self.max_upscale = shapes, max_ratio, max_upscale
        self.shapes = [shape for group in shapes for shape in group]  # (height, width)

    def describe(self) -> dict[str, Any]:
        """Plain values that tell two tables apart."""
        return {
            "shapes": [list(shape) for shape in self.shapes],
            "max_ratio": self.max_ratio,
            "max_upscale": self.max_upscale,
        }

    def of(self, side: np.ndarray) -> np.ndarray:
        """The number of each picture's bucket, (N,) uint8, or TOO_LONG or TOO_SMALL.

        It is the bucket that keeps most of the picture, so the nearest in ratio's logarithm. A picture whose size is
        not known (0) stands with the squares.

        Args:
            side: (N, 2), width and height, after any EXIF rotation.
        """
        width, height = side[:, 0].astype(np.float64), side[:, 1].astype(np.float64)
        unknown = (width < 1) | (height < 1)
        width[unknown] = height[unknown] = 1.0
        ratio = width / height
        found, first = np.full(len(side), TOO_SMALL, np.uint8), 0
        for number, shapes in enumerate(self._bases):
            heights, widths = np.array(shapes, np.float64).T
            ratios, nearest = widths / heights, np.zeros(len(side), np.uint8)
            for edge in np.sqrt(ratios[:-1] * ratios[1:]):  # few: faster than to search
                nearest += ratio >= edge
            upscale = np.maximum(widths.take(nearest) / width, heights.take(nearest) / height)
            limit = self.max_upscale if self.max_upscale is not None else (1.0 if number else np.inf)
            fits = (upscale <= limit) | unknown
            found[fits] = first + nearest[fits]
            first += len(shapes)
        found[np.maximum(width, height) / np.minimum(width, height) > self.max_ratio] = TOO_LONG
        return found

    def sort_out(self, side: np.ndarray) -> tuple[np.ndarray, Mapping[str, int]]:
        """Which samples have a bucket, (N,) bool; and how many each bucket and each rejection got."""
        counts, has_bucket = np.zeros(256, np.int64), np.empty(len(side), bool)
        for first in range(0, len(side), _CHUNK_SAMPLES):
            found = self.of(side[first : first + _CHUNK_SAMPLES])
            counts += np.bincount(found, minlength=256)
            has_bucket[first : first + _CHUNK_SAMPLES] = found < TOO_LONG
        shares = {f"bucket/{height}x{width}": int(n) for (height, width), n in zip(self.shapes, counts)}
        rejected = {f"rejected/{reason}": int(counts[code]) for code, reason in REASONS.items() if counts[code]}
        return has_bucket, {**shares, **rejected}


def deal(
    bucket: np.ndarray, num_carried: int, cell: int, num_cells: int, key: str, block: int
) -> tuple[np.ndarray, np.ndarray]:
    """Samples, in the order in which they came, into steps of `num_cells` cells of one bucket each.

    What does not fill a cell, and cells that do not fill a step, are left for the next block; what was left from the
    block before (the first `num_carried`) is served before anything else of its bucket, and its cell is not left again.

    Returns:
        (steps, num_cells * cell) int64, places in `bucket`; and (rest,) int64, the places left, the oldest first.
    """
    by_bucket = np.argsort(bucket, kind="stable")
    whole, rest = [np.zeros((0, cell), np.int64)], []
    for places in np.split(by_bucket, np.cumsum(np.bincount(bucket))[:-1]):
        num = len(places) // cell
        whole.append(places[: num * cell].reshape(num, cell))  # (cells, cell)
        rest.append(places[num * cell :])
    cells = np.concatenate(whole)  # (cells, cell)
    order = permutation(len(cells), key, block)
    is_old = cells[:, 0] < num_carried
    old = np.flatnonzero(is_old)
    first_served = np.concatenate([old[np.argsort(cells[old, 0])], order[~is_old[order]]])
    left = first_served[len(cells) // num_cells * num_cells :]
    order = order[~np.isin(order, left)]
    return cells[order].reshape(-1, num_cells * cell), np.sort(np.concatenate([*rest, cells[left].ravel()]))
