"""What a set of pictures looks like to a feature network: mean and covariance exactly, and some features kept whole.

Ranks add what each has seen, so the numbers are those of one rank and no feature matrix is ever gathered but the kept
part, whose size is bounded.
"""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import NamedTuple

import torch
import torch.distributed as dist
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from sdtrain.errors import ConfigError


class Moments(NamedTuple):
    """Of N feature vectors, in float64 on the CPU; the covariance is the unbiased one, over N - 1."""

    num_images: int
    mean: Tensor  # (F,)
    covariance: Tensor  # (F, F)
    kept: Tensor  # (K, F) float32: features of K <= N samples, drawn by a hash of their ids, in the order of the hash

    def save(self, path: Path, extractor: str) -> str:
        """Writes the moments with the hash of the network that made the features; the file's own sha256."""
        tensors = {"mean": self.mean, "covariance": self.covariance, "kept": self.kept}
        path.parent.mkdir(parents=True, exist_ok=True)
        save_file(
            {name: tensor.contiguous() for name, tensor in tensors.items()},
            path,
            {"num_images": str(self.num_images), "extractor": extractor},
        )
        return hashlib.sha256(path.read_bytes()).hexdigest()

    @classmethod
    def load(cls, path: Path, extractor: str, where: str = "--reference") -> tuple[Moments, str]:
        """Moments that `save` wrote, and the file's sha256. `where` is what named the file.

        Raises:
            ConfigError: for a file that is none, or whose features another network made.
        """
        try:
            digest = hashlib.sha256(path.read_bytes()).hexdigest()
            with safe_open(path, "pt") as file:
                meta = file.metadata() or {}
                tensors = {name: file.get_tensor(name) for name in ("mean", "covariance", "kept")}
                num_images = int(meta["num_images"])
        except (OSError, SafetensorError, KeyError, ValueError) as error:
            raise ConfigError(f"{where}: {path} holds no stored moments: {error}") from error
        if meta.get("extractor") != extractor:
            raise ConfigError(f"{where}: {path} was made with features {meta.get('extractor')}, not {extractor}")
        return cls(num_images, **tensors), digest


class FeatureMoments:
    """Accumulates features of this rank's samples; `reduce` is a collective, which every rank must call.

    Args:
        num_features: F.
        num_kept: so many features stay whole, those whose ids hash lowest: the same ones at any number of ranks and in
            any order of arrival.
        device: where the sums stand; one with float64.
    """

    def __init__(self, num_features: int, num_kept: int = 10_000, device: torch.device | str = "cpu") -> None:
        self.num_kept = num_kept
        self.num_images = torch.zeros((), dtype=torch.int64, device=device)
        self.sum = torch.zeros(num_features, dtype=torch.float64, device=device)
        self.outer = torch.zeros(num_features, num_features, dtype=torch.float64, device=device)
        self._features = torch.zeros(0, num_features)
        self._order = torch.zeros(0, dtype=torch.int64)
        self._new: list[tuple[Tensor, Tensor]] = []  # sorted in at times only: the kept part is large

    def update(self, features: Tensor, ids: Tensor) -> None:
        """Features (B, F) of the samples with these ids (B,); an id is seen once.

        Raises:
            ValueError: for features that are not finite: one would make every figure nan.
        """
        if not features.isfinite().all():
            raise ValueError("features that are not finite")
        exact = features.to(self.sum)
        self.num_images += len(exact)
        self.sum += exact.sum(dim=0)
        self.outer += exact.T @ exact
        self._new.append((features.detach().float().cpu(), _hash(ids.cpu())))
        if sum(len(order) for _, order in self._new) > self.num_kept:
            self._keep(self._new)

    def reduce(self) -> Moments:
        """The moments over all ranks, the same on each of them."""
        self._keep(self._new)
        if dist.is_initialized() and dist.get_world_size() > 1:
            self._exchange()
        num = int(self.num_images)
        if num < 2:
            raise ValueError(f"moments want at least 2 samples, and there are {num}")
        mean = self.sum / num
        covariance = (self.outer - num * mean.outer(mean)) / (num - 1)
        return Moments(num, mean.cpu(), covariance.cpu(), self._features)

    def _exchange(self) -> None:
        for value in (self.num_images, self.sum, self.outer):
            dist.all_reduce(value)
        others: list[tuple[Tensor, Tensor]] = [None] * dist.get_world_size()  # type: ignore[list-item]
        dist.all_gather_object(others, (self._features, self._order))
        own = dist.get_rank()
        self._keep([part for rank, part in enumerate(others) if rank != own])

    def _keep(self, parts: list[tuple[Tensor, Tensor]]) -> None:
        features, order = (torch.cat(found) for found in zip((self._features, self._order), *parts, strict=True))
        chosen = order.argsort()[: self.num_kept]
        self._features, self._order, self._new = features[chosen], order[chosen], []


def _hash(ids: Tensor) -> Tensor:
    """(B,) int64 -> (B,) int64, no two alike: bijective mixing with odd factors and shifts (splitmix64)."""
    mixed = ids.to(torch.int64) - 7046029254386353131  # 2^64 / golden ratio, as a signed number
    for factor, shift in ((-4658895280553007687, 30), (-7723592293110705685, 27)):
        mixed = (mixed ^ ((mixed >> shift) & ((1 << (64 - shift)) - 1))) * factor
    return mixed ^ ((mixed >> 31) & ((1 << 33) - 1))
