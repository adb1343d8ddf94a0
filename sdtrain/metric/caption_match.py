"""Does the picture say what its caption says? A reader of shape, colour, size, position and ground, trained on nothing.

It knows the vocabulary only. A pixel belongs to an object where it is further than half way from the ground to the
colour around it; connected pixels are one object; its colour is the nearest named one; its shape is the one that, drawn
with the area and the centroid found (which blur leaves alone), differs least from the picture.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import permutations
from typing import Any, Protocol

import numpy as np
import torch
from torch.nn.functional import max_pool2d
from typing_extensions import override

from sdtrain.errors import ConfigError
from sdtrain.metric.reader import Reader, blur

ATTRIBUTES = ("shape", "colour", "size", "position", "ground")
MIN_AREA_PIXELS = 16  # the smallest object covers about 45 pixels; less than this is a speck
MAX_OBJECTS = 4  # more are no reading
MAX_MISFIT = 0.25  # squared difference from the best shape, as a share of the area; more is no shape
NO_OBJECT_MISFIT = 1.0  # as far from every shape as an empty picture: the reading fails
BLURS_PIXELS = (0.0, 1.0)  # shapes are compared sharp and blurred, or a decoder's soft star would read as a circle
GRID = 192  # cells along the maps of signed distance


class Vocabulary(Protocol):
    """What the pictures can show. Colours are RGB in [0, 255]; sizes (ranges of the radius) and edges are pixels."""

    shapes: Sequence[str]
    colours: Mapping[str, tuple[int, int, int]]
    grounds: Mapping[str, tuple[int, int, int]]
    sizes: Mapping[str, tuple[float, float]]
    places: Sequence[str]  # row by row
    place_edges: Sequence[float]
    relations: Sequence[str]  # above, below, left of, right of
    distance_extent: float

    def distances(self, resolution: int) -> np.ndarray: ...


class CaptionMatch(Reader):
    """Reads pictures and scores them against attributes, the dictionaries that travel in the samples' .json members."""

    groups = (("one", "val", 1), ("two", "val", 2), ("heldout", "held_out", 1))  # name, split, number of things

    def __init__(self, vocabulary: Vocabulary, num_captions: int = 256) -> None:
        if num_captions < 2:
            raise ConfigError(f"caption_match.num_captions is {num_captions}; shuffled captions need at least 2")
        self.num_captions = num_captions
        self.vocabulary = vocabulary
        self._colours = np.array(list(vocabulary.colours.values()), np.float32)
        self._grounds = np.array(list(vocabulary.grounds.values()), np.float32)
        contrast = np.linalg.norm(self._grounds[:, None] - self._colours, axis=-1)
        self._threshold = 0.5 * contrast.min(axis=1)  # half way to the colour that is nearest to each ground
        self._distances = vocabulary.distances(GRID)
        inside = self._distances < 0
        cell = 2 * vocabulary.distance_extent / GRID
        axis = (np.arange(GRID) + 0.5) * cell - vocabulary.distance_extent
        count = inside.sum((1, 2))
        self._area = count * cell**2  # of each shape at radius 1
        self._centroid = np.stack([inside.sum(1) @ axis, inside.sum(2) @ axis], 1) / count[:, None]  # (8, 2)

    @override
    def read(self, images: np.ndarray) -> list[dict[str, Any]]:
        """What uint8 pictures (N, H, W, 3) show: their "ground" and "things", as in a scene's attributes.

        Things (shape, colour, size, x, y, radius) are in no order. A shape that is none of the vocabulary's is None;
        a picture of no objects, or of something that is no object, has no things.
        """
        readings: list[dict[str, Any]] = []
        for start in range(0, len(images), 128):
            readings += self._read_chunk(images[start : start + 128].astype(np.float32))
        return readings

    @override
    def shares(self, readings: Sequence[Mapping[str, Any]], wanted: Sequence[Mapping[str, Any]]) -> dict[str, float]:
        """Share of the pictures that show what their attributes say: "all" together, and each alone, in [0, 1].

        A picture with another number of objects meets nothing but the ground. Of two objects both must meet. Which
        object is which is decided in the picture's favour, so two objects that changed places miss the position only.
        """
        met = np.array([self._met(reading, attributes) for reading, attributes in zip(readings, wanted)])  # (N, 5)
        shares = dict(zip(ATTRIBUTES, met.mean(0).tolist()))
        return {"all": float(met.all(1).mean()), **shares}

    def _met(self, reading: Mapping[str, Any], wanted: Mapping[str, Any]) -> list[bool]:
        """One truth per attribute, under the assignment of objects to words that meets the most."""
        ground = reading["ground"] == wanted["ground"]
        if not reading["things"] or len(reading["things"]) != len(wanted["things"]):
            return [False] * 4 + [ground]
        options = []
        for things in permutations(reading["things"]):
            alike = np.array([[a[k] == b[k] for k in ATTRIBUTES[:3]] for a, b in zip(things, wanted["things"])])
            placed = self._position(things) == (wanted["relation"] or wanted["place"])
            options.append((alike.sum(), placed, alike.all(0).tolist()))
        _, placed, alike = max(options)
        return [*alike, placed, ground]

    def _position(self, things: Sequence[Mapping[str, Any]]) -> str:
        """The place of one object; where the first of two stands from the second."""
        if len(things) == 1:
            column, row = (int(np.searchsorted(self.vocabulary.place_edges, things[0][k])) for k in "xy")
            return self.vocabulary.places[(len(self.vocabulary.place_edges) + 1) * row + column]
        x, y = (things[0][k] - things[1][k] for k in "xy")
        return self.vocabulary.relations[int(y > 0) if abs(y) > abs(x) else 2 + int(x > 0)]

    def _read_chunk(self, pixels: np.ndarray) -> list[dict[str, Any]]:
        edge = [pixels[:, :2], pixels[:, -2:], pixels[:, :, :2], pixels[:, :, -2:]]
        ground = np.median(np.concatenate([side.reshape(len(pixels), -1, 3) for side in edge], 1), axis=1)  # (N, 3)
        named = np.linalg.norm(ground[:, None] - self._grounds, axis=-1).argmin(1)
        offset = pixels - ground[:, None, None]
        distance = np.linalg.norm(offset, axis=-1)  # (N, H, W)
        label = _components(distance > np.maximum(0.5 * _pool(distance, 5), self._threshold[named, None, None]))
        reach = label
        for _ in range(2):  # the soft edge, two pixels around every object, belongs to it
            reach = np.where(reach > 0, reach, _pool(reach.astype(np.float32), 3).astype(np.int32))
        names = list(self.vocabulary.grounds)
        return [
            {"ground": names[named[i]], "things": self._things(offset[i], ground[i], label[i], reach[i])}
            for i in range(len(pixels))
        ]

    def _things(
        self, offset: np.ndarray, ground: np.ndarray, label: np.ndarray, reach: np.ndarray
    ) -> list[dict[str, Any]]:
        found, count = np.unique(label[label > 0], return_counts=True)
        found = found[count >= MIN_AREA_PIXELS]
        if len(found) > MAX_OBJECTS:
            return []
        things = []
        for number in found:
            region = reach == number
            rows, columns = np.flatnonzero(region.any(1)), np.flatnonzero(region.any(0))
            crop = np.s_[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]
            colour = _inner_colour(offset[crop][label[crop] == number])
            alpha = region[crop] * (offset[crop] @ colour) / max(float(colour @ colour), 1.0)
            thing = self._fit(alpha, columns[0], rows[0])
            if thing is None:
                return []
            thing["colour"] = list(self.vocabulary.colours)[
                np.linalg.norm(self._colours - ground - colour, axis=1).argmin()
            ]
            things.append(thing)
        return things

    def _fit(self, alpha: np.ndarray, left: int, top: int) -> dict[str, Any] | None:
        """Draws every shape with the area and centroid of a coverage (H, W); the best names and places the object."""
        area = float(alpha.sum())
        if area < MIN_AREA_PIXELS:
            return None
        height, width = alpha.shape
        centroid = np.array([alpha.sum(0) @ (np.arange(width) + 0.5), alpha.sum(1) @ (np.arange(height) + 0.5)]) / area
        radius = np.sqrt(area / self._area)  # (8,)
        centre = centroid - radius[:, None] * self._centroid  # (8, 2)
        scale = GRID / 2 / self.vocabulary.distance_extent / radius[:, None]  # cells in a pixel
        column, row = (
            (((np.arange(length) + 0.5 - centre[:, axis, None]) * scale) + GRID / 2).astype(int).clip(0, GRID - 1)
            for axis, length in enumerate((width, height))
        )
        distance = self._distances[np.arange(len(radius))[:, None, None], row[:, :, None], column[:, None, :]]
        drawn = (0.5 - distance * radius[:, None, None]).clip(0, 1)  # (8, H, W)
        blurred = [blur(height, sigma) @ drawn @ blur(width, sigma) for sigma in BLURS_PIXELS]
        misfits = np.min([((shape - alpha) ** 2).sum((1, 2)) / area for shape in blurred], axis=0)
        best = int(misfits.argmin())
        if misfits[best] > NO_OBJECT_MISFIT:
            return None
        sizes = self.vocabulary.sizes
        return {
            "shape": self.vocabulary.shapes[best] if misfits[best] < MAX_MISFIT else None,
            "size": min(sizes, key=lambda name: max(sizes[name][0] - radius[best], radius[best] - sizes[name][1])),
            "x": float(left + centre[best, 0]),
            "y": float(top + centre[best, 1]),
            "radius": float(radius[best]),
        }


def _inner_colour(offsets: np.ndarray) -> np.ndarray:
    """An object's colour without its mixed edge, (P, 3) -> (3,), as an offset from the ground."""
    length = np.linalg.norm(offsets, axis=1)
    colour = offsets[length >= np.quantile(length, 0.7)].mean(0)
    return offsets[offsets @ colour >= 0.85 * (colour @ colour)].mean(0)


def _pool(values: np.ndarray, window: int) -> np.ndarray:
    """The largest value in a window around every pixel, (N, H, W) -> (N, H, W)."""
    return max_pool2d(torch.from_numpy(values)[:, None], window, stride=1, padding=window // 2)[:, 0].numpy()


def _components(mask: np.ndarray) -> np.ndarray:
    """4-connected components of every picture at once, (N, H, W) bool -> int32 labels, 0 outside.

    The largest pixel number spreads along every run of a row, then along every run of a column, until nothing changes.
    """
    label = np.where(mask, np.arange(1, mask.size + 1, dtype=np.int32).reshape(mask.shape), 0)
    across, down = _run_starts(mask), _run_starts(mask.swapaxes(1, 2))
    while True:
        spread = _spread(label, across)
        spread = np.ascontiguousarray(_spread(spread.swapaxes(1, 2), down).swapaxes(1, 2))
        if np.array_equal(spread, label):
            return label
        label = spread


def _run_starts(mask: np.ndarray) -> np.ndarray:
    starts = np.ones(mask.shape, bool)
    starts[..., 1:] = mask[..., 1:] != mask[..., :-1]
    return np.flatnonzero(starts)


def _spread(label: np.ndarray, starts: np.ndarray) -> np.ndarray:
    highest = np.maximum.reduceat(label.ravel(), starts)
    return np.repeat(highest, np.diff(starts, append=label.size)).reshape(label.shape)
