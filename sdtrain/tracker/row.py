"""What mirrors show of a row of metrics.jsonl: its numbers, and its histograms."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


def numbers(row: Mapping[str, Any]) -> dict[str, int | float]:
    """What curves are drawn of; nothing of an event."""
    if "event" in row:
        return {}
    return {key: value for key, value in row.items() if isinstance(value, int | float) and not isinstance(value, bool)}


def histograms(row: Mapping[str, Any]) -> dict[str, Mapping[str, Any]]:
    """What `callback.histogram` wrote: `counts` of equal bins from `low` to `high`."""
    return {key: value for key, value in row.items() if isinstance(value, Mapping) and "counts" in value}


def edges(histogram: Mapping[str, Any]) -> list[float]:
    """Of its bins, one more than there are."""
    num, low, high = len(histogram["counts"]), histogram["low"], histogram["high"]
    return [low + (high - low) * i / num for i in range(num + 1)]
