"""What a latent space is like: are neighbours in pixels neighbours in latents, and which channels say anything."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

_MOST_PIXELS = 64  # a side; larger pictures are averaged down, which keeps who is whose neighbour
_PAIRS_AT_ONCE = 1024
_LEAST_TOLD = 0.01  # of a channel's variance; a channel whose posterior is the prior tells none of the picture


class LatentSpace:
    """Gathers some pictures with their posteriors, batch by batch.

    Args:
        num_pairs: of pictures, whose distances are compared.
        seed: of which they are.
    """

    def __init__(self, num_pairs: int = 20_000, seed: int = 0) -> None:
        self.num_pairs, self.seed = num_pairs, seed
        self._pictures: list[Tensor] = []
        self._means: list[Tensor] = []
        self._noise: Tensor | float = 0.0  # sum of the posteriors' variances, by channel

    def add(self, image: Tensor, moments: Tensor) -> None:
        """Pictures (B, 3, H, W), all of one size, and the mean and std (B, 2, C, h, w) of their posteriors."""
        side = max(image.shape[2:])
        if side > _MOST_PIXELS:
            image = F.interpolate(image.float(), scale_factor=_MOST_PIXELS / side, mode="area")
        mean, std = moments.double().cpu().unbind(dim=1)  # (B, C, h, w)
        self._pictures.append(image.float().cpu().flatten(1))  # (B, P)
        self._means.append(mean)
        self._noise = self._noise + std.square().mean(dim=(2, 3)).sum(dim=0)  # (C,)

    def figures(self) -> dict[str, Any]:
        """As plain values.

        `neighbour_correlation` is Spearman's rank correlation of the pictures' distances with their latents', each
        channel in units of its own deviation; None where there is nothing to compare. `told` is the share of each
        channel's variance that differs between places and pictures, the rest being the posteriors' own noise; a channel
        that tells less than 1 % is dead (after Burda et al. 2016, section 2).
        """
        pictures, means = torch.cat(self._pictures), torch.cat(self._means)
        num = len(pictures)
        centre, spread = means.mean(dim=(0, 2, 3)), means.var(dim=(0, 2, 3), correction=0)
        noise = self._noise / num
        told = torch.where(spread > 0, spread / (spread + noise).clamp(min=1e-30), 0.0)
        latents = (means / spread.sqrt().clamp(min=1e-12)[:, None, None])[:, told >= _LEAST_TOLD]
        return {
            "num_images": num,
            "num_pairs": self.num_pairs,
            "neighbour_correlation": self._correlation(pictures, latents.flatten(1).float()),
            "channel_mean": centre.tolist(),
            "channel_std": (spread + noise).sqrt().tolist(),
            "told": told.tolist(),
            "dead_channels": torch.nonzero(told < _LEAST_TOLD).flatten().tolist(),
        }

    def _correlation(self, pictures: Tensor, latents: Tensor) -> float | None:
        num = len(pictures)
        if num < 3:
            return None
        generator = torch.Generator().manual_seed(self.seed)
        first = torch.randint(num, (self.num_pairs,), generator=generator)
        second = (first + torch.randint(1, num, (self.num_pairs,), generator=generator)) % num  # another one
        return rank_correlation(_distances(pictures, first, second), _distances(latents, first, second))


def rank_correlation(x: Tensor, y: Tensor) -> float | None:
    """Spearman's: Pearson's of the ranks, equal values sharing their mean rank. None where all are equal."""
    ranks = torch.stack([_ranks(x), _ranks(y)])  # (2, N)
    ranks = ranks - ranks.mean(dim=1, keepdim=True)
    length = ranks.norm(dim=1)
    return float(ranks[0] @ ranks[1] / length.prod()) if length.min() > 0 else None


def _ranks(values: Tensor) -> Tensor:
    _, place, count = values.unique(return_inverse=True, return_counts=True)
    return (count.cumsum(0) - (count - 1) / 2).double()[place]


def _distances(points: Tensor, first: Tensor, second: Tensor) -> Tensor:
    pairs = zip(first.split(_PAIRS_AT_ONCE), second.split(_PAIRS_AT_ONCE))
    return torch.cat([(points[a] - points[b]).square().sum(dim=1) for a, b in pairs])  # (P,) squared: only ranks count
