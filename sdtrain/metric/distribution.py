"""Are drawn pictures distributed as real ones? What a network sees of both, and the figures between them (FID, ...)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from sdtrain.errors import ConfigError
from sdtrain.metric.extractor import Extractor
from sdtrain.metric.figures import check, figures
from sdtrain.metric.moments import FeatureMoments, Moments

SEED_STRIDE = 1_000_003  # batch c of a set of drawn pictures is drawn with seed + c * this, by whichever rank


def shares(num: int, size: int, rank: int, world_size: int) -> Iterator[tuple[int, list[int]]]:
    """A rank's batches of the places 0 to num - 1, with their numbers: none comes twice. All ranks get as many, so some
    have an empty one at the end.
    """
    for first in range(0, -(-num // size), world_size):
        number = first + rank
        yield number, list(range(number * size, min((number + 1) * size, num)))


def network_of(extractor: Extractor) -> str:
    """What stored moments must have been made with."""
    return f"{extractor.identity['network']}:{extractor.identity['sha256']}:{extractor.resize}"


class Seen:
    """What a network sees of a set of pictures, of which every rank has a share."""

    def __init__(self, extractor: Extractor, num_kept: int, device: torch.device | str) -> None:
        self.extractor, self.device = extractor.to(device), device
        self._moments = FeatureMoments(extractor.num_features, num_kept, device)

    def add(self, pictures: np.ndarray, places: Sequence[int]) -> Tensor:
        """Features (B, F) of uint8 pictures (B, H, W, 3), whose places tell them apart."""
        planes = torch.from_numpy(pictures).permute(0, 3, 1, 2).to(self.device)  # (B, 3, H, W)
        features = self.extractor(planes)
        self._moments.update(features, torch.tensor(places))
        return features

    def reduce(self) -> Moments:
        """Over all ranks, on each of them. Every rank must call it."""
        return self._moments.reduce()


class Distribution:
    """Figures of pictures that are drawn while a model trains, beside the held-out ones.

    They are those of `tools/evaluate.py RUN` with the same extractor, numbers and seed, at the same step.

    Args:
        extractor: the network.
        metric: fid (Inception's alone), fd, kid, cmmd, precision_recall, inception_score.
        num_images: drawn each time, with the captions of the held-out pictures, which come round again. A Frechet
            distance of few pictures is too high: compare figures of the same number alone.
        batch: pictures drawn at once.
        num_kept: features kept whole, for what is not of means and covariances.
        seed: of the noise, not the run's: runs of other seeds are compared by the same noise.
        reference: a file that `tools/evaluate.py --write-reference` wrote; null: the held-out pictures.

    Raises:
        ConfigError: for a figure that the network does not give.
    """

    def __init__(
        self,
        extractor: Extractor,
        metric: Sequence[str],
        num_images: int = 1000,
        batch: int = 64,
        num_kept: int = 10_000,
        seed: int = 0,
        reference: str | None = None,
    ) -> None:
        for name in metric:
            check(name, extractor, "metric.distribution.metric")
        if "clip_score" in metric:
            raise ConfigError("metric.distribution.metric: clip_score is of captions; ask tools/evaluate.py for it")
        if num_images < 2:
            raise ConfigError(f"metric.distribution.num_images={num_images}: give at least 2")
        self.extractor, self.metric = extractor, list(metric)
        self.num_images, self.batch, self.num_kept, self.seed = num_images, batch, num_kept, seed
        self.real: Moments | None = None
        if reference is not None:
            self.real, _ = Moments.load(Path(reference), network_of(extractor), "metric.distribution.reference")

    def see(self, device: torch.device | str) -> Seen:
        """An empty set."""
        return Seen(self.extractor, self.num_kept, device)

    def figures(self, drawn: Moments) -> dict[str, float]:
        """Beside the real ones, which `real` must have."""
        return figures(self.metric, self.extractor, drawn, self.real, self.seed)
