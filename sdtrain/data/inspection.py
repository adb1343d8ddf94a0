"""What is in some shards, from their index alone: sizes, shapes, captions, repeats, metadata."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from sdtrain.data.index import Index
from sdtrain.data.layout import ABSENT, CAPTION, IMAGE

_QUANTILES = (0, 5, 50, 95, 100)
_SIDES = (1, 64, 128, 256, 384, 512, 768, 1024, 2048)  # of the shorter side, in pixels
_ASPECTS = ("1:4", "1:3", "1:2", "9:16", "2:3", "3:4", "1:1", "4:3", "3:2", "16:9", "2:1", "3:1", "4:1")
_MAX_WORDS = 8  # values of a column of words that are told


class Repeats(NamedTuple):
    """Samples that have what another one has."""

    num_samples: int  # beyond the first of each
    num_groups: int
    largest: int  # samples in the largest group
    example: str  # the name of one of its samples


def quantiles(values: np.ndarray) -> dict[str, float]:
    """Minimum, percentiles, maximum and mean, by name; nothing of nothing."""
    if not len(values):
        return {}
    found = np.percentile(values, _QUANTILES)
    names = ["min", *(f"{q}%" for q in _QUANTILES[1:-1]), "max"]
    return {**dict(zip(names, found.tolist())), "mean": float(np.mean(values, dtype=np.float64))}


def spreads(index: Index) -> dict[str, dict[str, float]]:
    """Quantiles of what every sample has, and of every column of numbers."""
    known = (index.side > 0).all(1)
    rows = {
        "width": index.side[known, 0],
        "height": index.side[known, 1],
        "image bytes": index.size[:, IMAGE],
        "caption length": index.caption_length,
        "samples a shard": np.bincount(index.shard, minlength=len(index.shards)),
    }
    rows |= {name: column[~np.isnan(column)] for name, column in index.columns.items() if column.dtype.kind == "f"}
    return {name: quantiles(values) for name, values in rows.items()}


def sides(index: Index) -> dict[str, int]:
    """How many samples by their shorter side."""
    shorter = index.side.min(1)
    counts = np.histogram(shorter, [0, *_SIDES, np.inf])[0].tolist()
    names = ["unreadable", *(f"{a} to {b - 1}" for a, b in zip(_SIDES, _SIDES[1:])), f"{_SIDES[-1]} and more"]
    return {name: count for name, count in zip(names, counts) if count}


def aspects(index: Index) -> dict[str, int]:
    """How many samples by the nearest common ratio of width to height, in ratios."""
    side = index.side[(index.side > 0).all(1)]
    centres = np.log([int(width) / int(height) for width, height in (name.split(":") for name in _ASPECTS)])
    edges = [-np.inf, *((centres[:-1] + centres[1:]) / 2), np.inf]
    counts = np.histogram(np.log(side[:, 0] / side[:, 1]), edges)[0]
    return dict(zip(_ASPECTS, counts.tolist()))


def repeats(index: Index, kind: int) -> Repeats:
    """Samples whose image (or caption) has the size and checksum of another's: the same bytes, all but surely."""
    here = np.flatnonzero(index.size[:, kind] != ABSENT)
    marks = index.crc[here, kind].astype(np.uint64) << np.uint64(32) | index.size[here, kind].astype(np.uint64)
    _, firsts, counts = np.unique(marks, return_index=True, return_counts=True)
    if not (counts > 1).any():
        return Repeats(0, 0, 0, "")
    most = counts.argmax()
    example = index.name(int(here[firsts[most]]))
    return Repeats(int((counts - 1).sum()), int((counts > 1).sum()), int(counts[most]), example)


def words(index: Index) -> dict[str, dict[str, int]]:
    """The commonest values of every column of words."""
    found = {}
    for name, column in index.columns.items():
        if column.dtype.kind == "S":
            values, counts = np.unique(column, return_counts=True)
            order = np.argsort(-counts, kind="stable")[:_MAX_WORDS]
            found[name] = {values[i].decode(errors="replace") or "(none)": int(counts[i]) for i in order}
    return found


def num_bytes(index: Index) -> dict[str, int]:
    """Of the shards, and of the members that samples have."""
    names = {"images": IMAGE, "captions": CAPTION}
    members = {name: int(np.maximum(index.size[:, kind], 0).sum()) for name, kind in names.items()}
    return {"shards": sum(shard.num_bytes for shard in index.shards), **members}
