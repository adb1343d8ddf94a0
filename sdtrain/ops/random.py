"""Counter-based random numbers: every draw is a function of (seed, purpose, epoch, sample id, position), of nothing
else.

Philox4x32-10 (Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3") in int64 tensor operations, so the
integers
are the same on every device, at any world size, in any order, before and after a resume.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

_MASK = 0xFFFFFFFF
_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_WEYL = (0x9E3779B9, 0xBB67AE85)


def _multiply(a: Tensor, constant: int) -> tuple[Tensor, Tensor]:
    product = a * constant  # wraps modulo 2^64, which keeps both halves right
    return (product >> 32) & _MASK, product & _MASK


def philox(counter: tuple[Tensor, Tensor, Tensor, Tensor], key: tuple[int, int]) -> Tensor:
    """Four 32-bit words per counter, in int64. Counters broadcast; the words stand in a new last dimension."""
    c0, c1, c2, c3 = torch.broadcast_tensors(*counter)
    k0, k1 = key
    for _ in range(10):
        hi0, lo0 = _multiply(c0, _MULTIPLIERS[0])
        hi1, lo1 = _multiply(c2, _MULTIPLIERS[1])
        c0, c1, c2, c3 = hi1 ^ c1 ^ k0, lo1, hi0 ^ c3 ^ k1, lo0
        k0, k1 = (k0 + _WEYL[0]) & _MASK, (k1 + _WEYL[1]) & _MASK
    return torch.stack((c0, c1, c2, c3), dim=-1)


@dataclass(frozen=True)
class Draw:
    """Random numbers for a batch of samples, keyed by who the sample is and not by where it is computed.

    Args:
        seed: the run's seed.
        sample_id: (B,) int64, the samples' numbers in the index.
        epoch: (B,) int64, how often each was met before.
        place: (B,) int64, where in the order of a training run each stands, the same at any world size: for what is to
            be spread over a step's samples. No random number depends on it.
    """

    seed: int
    sample_id: Tensor
    epoch: Tensor
    place: Tensor | None = None

    @classmethod
    def of(cls, seed: int, num_samples: int, device: torch.device | str = "cpu") -> Draw:
        """A draw for pictures that are no samples of a data set: numbered from 0, in epoch 0."""
        ids = torch.arange(num_samples, device=device)
        return cls(seed, ids, torch.zeros_like(ids))

    def bits(self, purpose: str, shape: Sequence[int] = ()) -> Tensor:
        """(B, *shape) int64 words, uniform on [0, 2^32). One purpose, one stream: asking twice gives the same words."""
        digest = hashlib.blake2b(f"{self.seed}/{purpose}".encode(), digest_size=8).digest()
        key = (int.from_bytes(digest[:4], "little"), int.from_bytes(digest[4:], "little"))
        per_sample = math.prod(shape)
        position = torch.arange((per_sample + 3) // 4, device=self.sample_id.device)[None]  # (1, ceil(N / 4))
        sample, epoch = self.sample_id[:, None], self.epoch[:, None]  # (B, 1)
        words = philox((position, sample & _MASK, (sample >> 32) & _MASK, epoch & _MASK), key)
        return words.flatten(1)[:, :per_sample].reshape(-1, *shape)  # (B, *shape)

    def uniform(self, purpose: str, shape: Sequence[int] = ()) -> Tensor:
        """(B, *shape) float32, uniform on the open interval (0, 1), in steps of 2^-23."""
        # 23 bits and a half are 24: one bit more, and the largest would round to 1.
        return ((self.bits(purpose, shape) >> 9).float() + 0.5) * 2.0**-23

    def normal(self, purpose: str, shape: Sequence[int] = ()) -> Tensor:
        """(B, *shape) float32, standard normal (Box and Muller 1958)."""
        per_sample = math.prod(shape)
        half = (per_sample + 1) // 2
        u = self.uniform(purpose, (2, half))  # (B, 2, ceil(N / 2))
        radius, angle = torch.sqrt(-2.0 * torch.log(u[:, 0])), 2.0 * math.pi * u[:, 1]
        pair = torch.cat((radius * torch.cos(angle), radius * torch.sin(angle)), dim=1)
        return pair[:, :per_sample].reshape(-1, *shape)  # (B, *shape)
