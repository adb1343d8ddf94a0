"""Samples by number: bytes by offset, checked, decoded, made into batches; bad ones replaced and counted by reason."""

from __future__ import annotations

import json
import os
import zlib
from collections import Counter, OrderedDict
from collections.abc import Callable
from typing import Any, BinaryIO, TypeVar

import numpy as np
import torch
from torch import Tensor

from sdtrain.contracts import Batch
from sdtrain.data.bad_sample import REASONS, BadSample
from sdtrain.data.caption import clean_caption
from sdtrain.data.decode import decode_image
from sdtrain.data.index import ABSENT, CAPTION, IMAGE, JSON, MAX_BYTES, Index
from sdtrain.errors import ConfigError

_CODES = {reason: code for code, reason in enumerate(REASONS, start=1)}  # 0: the sample is good, or not read yet
_TOO_LARGE = {IMAGE: "image_too_large", CAPTION: "caption_too_large", JSON: "bad_json"}
_MAX_OPEN_SHARDS = 64
_WINDOW_READS = 1000
_MAX_TRIES = 1000

Text = tuple[str, dict[str, Any] | None]
T = TypeVar("T")


class Reader:
    """Random access to the samples of one split.

    A bad sample's place is taken by the next good one, cyclically: a function of the bytes alone, so every rank, worker
    and resumed run makes the same replacement. `sample_id` stays the place's own number.

    Args:
        index: the samples.
        image_size: pictures are made square of this side, in pixels.
        num_cached: the first so many samples stay decoded in memory (never in DataLoader workers).
        max_bad_fraction: more bad samples than this among the last thousand reads end the run.
        num_workers: how many DataLoader workers will count into the accounting.
    """

    def __init__(
        self, index: Index, image_size: int, num_cached: int = 0, max_bad_fraction: float = 0.1, num_workers: int = 0
    ) -> None:
        self.index, self.image_size, self.max_bad_fraction = index, image_size, max_bad_fraction
        # (process, 1 + reason), shared with the workers: row 0 is the main process; column 0 counts good reads
        self._counts = torch.zeros(num_workers + 1, len(REASONS) + 1, dtype=torch.int64).share_memory_()
        self._row = 0
        self._window = np.zeros(len(REASONS) + 1, np.int64)
        self._shown = np.full(len(index), -1, np.int64)  # the sample that stands at each place; -1: not read yet
        self._code = np.zeros(len(index), np.uint8)  # why the place's own sample is bad
        self._latents: Tensor | None = None
        self._start(num_cached)

    def _start(self, num_cached: int) -> None:
        self._shards: OrderedDict[int, BinaryIO] = OrderedDict()
        self._texts: dict[int, Text] = {}
        self._num_cached = num_cached
        self._held = np.zeros(len(self.index), bool)
        self._cache = np.zeros((num_cached, self.image_size, self.image_size, 3), np.uint8)  # pages come as they fill

    def __getstate__(self) -> dict[str, Any]:
        own = ("_shards", "_texts", "_num_cached", "_held", "_cache")  # one process's
        return {name: value for name, value in self.__dict__.items() if name not in own}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._start(0)

    def enter_worker(self, worker: int) -> None:
        """From here on this is the copy of a DataLoader worker: no cache, and a row of its own to count in."""
        self._start(0)
        self._row = worker + 1

    def batch(self, ids: np.ndarray, epochs: np.ndarray, as_images: bool = False) -> Batch:
        """The samples at some places. With latents attached, `latent` stands where `image` would, unless asked for."""
        ids = np.asarray(ids, np.int64)
        batch: Batch = {}
        if self._latents is None or as_images:
            batch["image"] = _to_float(self._pictures(ids))
        else:
            batch["latent"] = self._latents[torch.from_numpy(ids)]
        self._count(ids)
        shown = self._shown[ids].tolist()
        texts = [self._text(sample) for sample in shown]
        batch["caption"] = [caption for caption, _ in texts]
        batch["attributes"] = [attributes for _, attributes in texts]
        batch["key"] = [self.index.name(sample) for sample in shown]
        batch["sample_id"] = torch.from_numpy(ids)
        batch["epoch"] = torch.from_numpy(np.asarray(epochs, np.int64))
        return batch

    def texts(self) -> list[Text]:
        """Caption and attributes of every place, a pair from one sample; pictures are not looked at."""
        return [self._next_good(place, self._text)[0] for place in range(len(self.index))]

    def shown(self) -> Tensor:
        """(N,) int64: the sample that stands at each place, its own number unless it is bad. Reads what is unread."""
        for place in np.flatnonzero(self._shown < 0).tolist():
            self._picture(place)
        return torch.from_numpy(self._shown.copy())

    def attach_latents(self, mean_std: Tensor, shown: Tensor | None = None) -> None:
        """Batches now carry these (N, 2, C, h, w) rows. `shown` is what stood at each place when they were made."""
        if len(mean_std) != len(self.index):
            raise ConfigError(f"data: {len(mean_std)} latents for {len(self.index)} samples; they are of other shards")
        self._shown = (self.shown() if shown is None else shown).numpy().astype(np.int64)
        replaced = self._shown != np.arange(len(self.index))
        self._code[replaced & (self._code == 0)] = _CODES["replaced_in_latents"]
        self._latents = mean_std

    def accounting(self) -> dict[str, int]:
        """Reads and replacements so far, by reason, of this process and its workers."""
        counts = self._counts.sum(0).tolist()
        reasons = {f"replaced/{reason}": count for reason, count in zip(REASONS, counts[1:]) if count}
        return {"read": sum(counts), "replaced": sum(counts[1:]), **reasons}

    def _pictures(self, ids: np.ndarray) -> np.ndarray:
        if self._held[ids].all():
            return self._cache[ids]  # (B, H, W, 3)
        return np.stack([self._picture(place) for place in ids.tolist()])

    def _picture(self, place: int) -> np.ndarray:
        if self._held[place]:
            return self._cache[place]
        pixels, self._shown[place] = self._next_good(place, self._decode)
        if place < self._num_cached:
            self._cache[place] = pixels
            self._held[place] = True
        return pixels

    def _decode(self, sample: int) -> np.ndarray:
        self._text(sample)  # a picture with a bad caption is a bad sample
        return decode_image(self._bytes(sample, IMAGE), self.image_size)

    def _text(self, sample: int) -> Text:
        if sample in self._texts:
            return self._texts[sample]
        sizes = self.index.size[sample]
        caption = "" if sizes[CAPTION] == ABSENT else clean_caption(self._bytes(sample, CAPTION))
        text = caption, (None if sizes[JSON] == ABSENT else _parse_json(self._bytes(sample, JSON)))
        if sample < self._num_cached:
            self._texts[sample] = text
        return text

    def _next_good(self, place: int, read: Callable[[int], T]) -> tuple[T, int]:
        """What `read` makes of the sample at a place, or of the next one it can read; and which one that was."""
        for step in range(min(len(self.index), _MAX_TRIES)):
            sample = (place + step) % len(self.index)
            if self._code[sample]:
                continue
            try:
                return read(sample), sample
            except BadSample as bad:
                self._code[sample] = _CODES[bad.reason]
        raise ConfigError(f"data: none of {step + 1} samples in a row can be read: {self._blame()}")

    def _bytes(self, sample: int, kind: int) -> bytes:
        size = int(self.index.size[sample, kind])
        if size > MAX_BYTES[kind]:
            raise BadSample(_TOO_LARGE[kind], f"{size} bytes")
        file = self._shard(int(self.index.shard[sample]))
        data = os.pread(file.fileno(), size, int(self.index.offset[sample, kind]))
        if zlib.crc32(data) != self.index.crc[sample, kind]:
            raise BadSample("crc_mismatch", f"{self.index.name(sample)} changed since it was indexed")
        return data

    def _shard(self, number: int) -> BinaryIO:
        if number in self._shards:
            self._shards.move_to_end(number)
        else:
            self._shards[number] = self.index.shards[number].open("rb", buffering=0)
            if len(self._shards) > _MAX_OPEN_SHARDS:
                self._shards.popitem(last=False)[1].close()
        return self._shards[number]

    def _count(self, ids: np.ndarray) -> None:
        counts = np.bincount(self._code[ids], minlength=len(REASONS) + 1)
        self._counts[self._row] += torch.from_numpy(counts)
        self._window += counts
        reads, bad = int(self._window.sum()), int(self._window[1:].sum())
        if reads < _WINDOW_READS:
            return
        self._window[:] = 0
        if bad > self.max_bad_fraction * reads:
            raise ConfigError(
                f"data: {bad} of the last {reads} samples could not be used: {self._blame()}. "
                f"Repair the shards, or raise data.max_bad_fraction (now {self.max_bad_fraction})"
            )

    def _blame(self) -> str:
        """The reasons, and the shard that has most of the bad samples."""
        bad = np.flatnonzero(self._code)
        reasons = Counter(REASONS[code - 1] for code in self._code[bad].tolist())
        worst = self.index.shards[np.bincount(self.index.shard[bad]).argmax()]
        return f"{', '.join(f'{reason} {count}' for reason, count in reasons.most_common())}; most of them in {worst}"


def _parse_json(data: bytes) -> dict[str, Any]:
    def refuse(constant: str) -> None:
        raise ValueError(constant)

    try:
        value = json.loads(data, parse_constant=refuse)
    except (ValueError, RecursionError) as error:
        raise BadSample("bad_json", str(error)) from error
    if not isinstance(value, dict):
        raise BadSample("bad_json", "not an object")
    return value


def _to_float(pixels: np.ndarray) -> Tensor:
    """uint8 (B, H, W, 3) -> float32 (B, 3, H, W) in [-1, 1], channels last in memory, as the networks run."""
    return torch.from_numpy(pixels).permute(0, 3, 1, 2).float().div_(127.5).sub_(1.0)  # (B, 3, H, W)
