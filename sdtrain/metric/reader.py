"""What readers of pictures share: scores of samples with their limits beside them, and the blur of a decoder."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from functools import cache
from typing import Any, TypedDict

import numpy as np


class Group(TypedDict):
    """One kind of captions: real pictures, what they show, their reconstructions, and samples from their captions."""

    real: np.ndarray  # uint8 (N, H, W, 3), as are the other two
    attributes: Sequence[Mapping[str, Any]]
    reconstructions: np.ndarray
    samples: np.ndarray


class Reader(ABC):
    """Reads pictures and scores them against attributes, the dictionaries that travel in the samples' .json members."""

    @abstractmethod
    def read(self, images: np.ndarray) -> list[dict[str, Any]]:
        """What uint8 pictures (N, H, W, 3) show."""

    @abstractmethod
    def shares(self, readings: Sequence[Mapping[str, Any]], wanted: Sequence[Mapping[str, Any]]) -> dict[str, float]:
        """Of readings that agree with attributes, in [0, 1]: "all" together, and each figure alone."""

    def score(self, images: np.ndarray, attributes: Sequence[Mapping[str, Any]]) -> dict[str, float]:
        """The shares of pictures (N, H, W, 3).

        Raises:
            ValueError: without a picture, or for another number of attributes.
        """
        return self._score(self.read(images), attributes)

    def report(self, groups: Mapping[str, Group]) -> dict[str, dict[str, Any]]:
        """Each group's score on its samples, and its limits.

        {group: score, "ceiling": {group: score of the real pictures}, "reconstruction": {group: ...},
        "floor": {group: score of the samples against the captions of their neighbours}}
        """
        report: dict[str, dict[str, Any]] = {"ceiling": {}, "reconstruction": {}, "floor": {}}
        for name, group in groups.items():
            attributes, samples = list(group["attributes"]), self.read(group["samples"])
            report[name] = self._score(samples, attributes)
            report["ceiling"][name] = self.score(group["real"], attributes)
            report["reconstruction"][name] = self.score(group["reconstructions"], attributes)
            report["floor"][name] = self._score(samples, attributes[1:] + attributes[:1])
        return report

    def _score(self, readings: Sequence[Mapping[str, Any]], wanted: Sequence[Mapping[str, Any]]) -> dict[str, float]:
        if not readings or len(readings) != len(wanted):
            raise ValueError(f"{len(readings)} pictures against the attributes of {len(wanted)}")
        return self.shares(readings, wanted)


@cache
def blur(length: int, sigma: float) -> np.ndarray:
    """The matrix that blurs a line of pixels, (length, length)."""
    step = np.arange(length)[:, None] - np.arange(length)
    weight = np.exp(-0.5 * (step / sigma) ** 2) / (sigma * np.sqrt(2 * np.pi)) if sigma else np.eye(length)
    return weight.astype(np.float32)
