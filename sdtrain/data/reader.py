"""Samples by number: read, decoded, made into batches; bad ones replaced and counted by reason."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor

from sdtrain.contracts import Batch
from sdtrain.data.accounting import Accounting
from sdtrain.data.attributes import parse_json
from sdtrain.data.bad_sample import BadSample
from sdtrain.data.caption import CaptionRule
from sdtrain.data.index import Index
from sdtrain.data.layout import CAPTION, COMPANIONS, IMAGE, JSON
from sdtrain.data.members import Member, Members
from sdtrain.data.quarantine import Quarantine
from sdtrain.data.storage import Storage
from sdtrain.data.view import Pictures, View, check_crop, decode_pictures, draw_views, pictured
from sdtrain.errors import ConfigError
from sdtrain.ops.random import Draw

_TEXTS_AT_ONCE, _LOOKED_AT_ONCE = 1024, 16

Attributes = dict[str, Any] | None


class _Sample(NamedTuple):
    shown: int  # whose picture and caption these are
    text: bytes | None
    attributes: Attributes
    caption: str
    picture: Pictures | None
    is_decoded: bool = False  # just now, not recalled


class Reader:
    """Random access to the samples of one split.

    A bad sample's place is taken by the next good one, cyclically: a function of the bytes alone, so every rank, worker
    and resumed run makes the same replacement. `sample_id` stays the place's own number. Crop, flip and the choice
    among captions are drawn by (seed, epoch, sample id), so they are the same wherever the sample is read.

    Args:
        index: the samples.
        image_size: pictures are made square of this side, in pixels, where `batch` is given no size.
        num_cached: the first so many samples stay decoded in memory (never in DataLoader workers, and only where
            every epoch shows the same: a centre crop, no flip).
        num_workers: DataLoader workers that will count into the accounting.
        crop: what stands out of the target is cut "center" or at "random".
        flip: mirror half of the pictures.
        ground: what is seen through transparent pixels, as RGB.
        caption: which caption is told; None: the .txt member as it is.
        storage: where bytes come from; None reads files, and keeps nothing of remote ones.
        max_bad_fraction: more bad samples than this among the last 10,000 reads end the run.
    """

    def __init__(
        self,
        index: Index,
        image_size: int,
        num_cached: int = 0,
        num_workers: int = 0,
        crop: Literal["center", "random"] = "center",
        flip: bool = False,
        ground: tuple[int, int, int] = (255, 255, 255),
        caption: CaptionRule | None = None,
        storage: Storage | None = None,
        max_bad_fraction: float = 0.01,
    ) -> None:
        self.index, self.image_size = index, image_size
        self.crop, self.flip, self.ground, self.seed = check_crop(crop), flip, tuple(ground), 0
        self.caption = caption or CaptionRule()
        self._members = Members(index, storage or Storage())
        self._accounting = Accounting(index.shards, len(index), num_workers, max_bad_fraction)
        self._bad: dict[int, str] = {}  # sample -> why it is bad, as far as this process knows
        self._companions: tuple[str, ...] = ()
        self._latents: Tensor | None = None
        self._latents_shown: np.ndarray | None = None  # (N,) whose latent stands at each place
        self._is_read = np.zeros(len(index), bool)  # which places' pictures this process knows; none in a worker
        self._start(num_cached if crop == "center" and not flip else 0)

    def _start(self, num_cached: int) -> None:
        self._num_cached = num_cached
        self._kept: dict[int, _Sample] = {}
        self._cache = np.zeros((num_cached, self.image_size, self.image_size, 3), np.uint8)  # pages come as they fill

    def __getstate__(self) -> dict[str, Any]:
        own = ("_num_cached", "_kept", "_cache", "_is_read")  # one process's
        return {name: value for name, value in self.__dict__.items() if name not in own}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state, _is_read=np.zeros(0, bool))
        self._start(0)

    def enter_worker(self, worker: int) -> None:
        """From here on this is the copy of a DataLoader worker: no cache, and counts and files of its own."""
        self._is_read = np.zeros(0, bool)
        self._start(0)
        self._members.storage.enter_worker()
        self._accounting.enter_worker(worker)

    def connect(self, seed: int, directory: Path | None = None, rank: int = 0) -> None:
        """What the run knows: its seed, and where the record of bad samples goes, of which rank."""
        self.seed = seed
        self._accounting.quarantine = Quarantine(directory, rank)

    def accompany(self, names: Collection[str]) -> None:
        """Batches of pictures carry these companions, where samples have them; decoded ones are not kept in memory."""
        self._companions = tuple(name for name in COMPANIONS if name in names and self.index.has(name))
        if self._companions:
            self._start(0)

    def batch(
        self, ids: np.ndarray, epochs: np.ndarray, size: tuple[int, int] | None = None, as_images: bool = False
    ) -> Batch:
        """The samples at some places, all of one size. With latents attached, `latent` stands where `image` would.

        Args:
            ids: (B,) places.
            epochs: (B,) how often each was met before.
            size: the pictures' height and width; None makes them square of `image_size`.
            as_images: pictures even where latents are attached.
        """
        ids, epochs = np.asarray(ids, np.int64), np.asarray(epochs, np.int64)
        is_decoded = self._latents is None or as_images
        views = self._views(ids, epochs, (size or (self.image_size, self.image_size)) if is_decoded else None)
        samples = self._samples(ids.tolist(), views)
        self._count(ids.tolist(), samples)
        batch: Batch = {
            "caption": [sample.caption for sample in samples],
            "attributes": [sample.attributes for sample in samples],
            "key": [self.index.name(sample.shown) for sample in samples],
            "sample_id": torch.from_numpy(ids),
            "epoch": torch.from_numpy(epochs),
        }
        if is_decoded:
            batch |= pictured([sample.picture for sample in samples])
        else:
            batch["latent"] = self._latents[batch["sample_id"]]
        return batch

    def texts(self) -> list[tuple[str, Attributes]]:
        """Caption and attributes of every place, a pair from one sample; pictures are not looked at."""
        places = np.arange(len(self.index))
        parts = (places[first : first + _TEXTS_AT_ONCE] for first in range(0, len(places), _TEXTS_AT_ONCE))
        samples = [s for part in parts for s in self._samples(part.tolist(), self._views(part, part * 0, None))]
        return [(sample.caption, sample.attributes) for sample in samples]

    def stored_texts(self, places: np.ndarray) -> Iterator[tuple[bytes | None, Attributes]]:
        """The .txt and .json members that stand at some places, without those that cannot be read."""
        for first in range(0, len(places), _LOOKED_AT_ONCE):
            for members in self._members.read(places[first : first + _LOOKED_AT_ONCE], (CAPTION, JSON)):
                with suppress(BadSample):
                    if not isinstance(members, BadSample):
                        text, attributes = (None if member is None else bytes(member) for member in members)
                        yield text, None if attributes is None else parse_json(attributes)

    def shown(self) -> Tensor:
        """(N,) int64: the sample that stands at each place, its own number unless it is bad. Reads what is unread."""
        if self._latents_shown is not None:
            return torch.from_numpy(self._latents_shown.copy())
        for place in np.flatnonzero(~self._is_read).tolist():
            self._samples([place], [View((self.image_size, self.image_size))])
        shown = np.arange(len(self.index))
        for place in self._bad:
            shown[place] = self._first(place)
        return torch.from_numpy(shown)

    def attach_latents(self, mean_std: Tensor, shown: Tensor | None = None) -> None:
        """Batches now carry these (N, 2, C, h, w) rows. `shown` is what stood at each place when they were made."""
        if len(mean_std) != len(self.index):
            raise ConfigError(f"data: {len(mean_std)} latents for {len(self.index)} samples; they are of other shards")
        self._latents_shown = (self.shown() if shown is None else shown).numpy().astype(np.int64)
        self._latents = mean_std
        self._kept.clear()

    def accounting(self) -> dict[str, int]:
        """Reads, replacements by reason and shard, bytes, of this process and its workers."""
        return self._accounting.report()

    def _views(self, ids: np.ndarray, epochs: np.ndarray, size: tuple[int, int] | None) -> list[View]:
        draw = Draw(self.seed, torch.from_numpy(ids), torch.from_numpy(epochs))
        return draw_views(draw, len(ids), size, self.crop, self.flip)

    def _samples(self, places: Sequence[int], views: list[View]) -> list[_Sample]:
        """What stands at some places. What is not kept in memory is asked for at once."""
        found: list[_Sample | None] = [self._recall(place, view) for place, view in zip(places, views)]
        unread = [number for number, sample in enumerate(found) if sample is None]
        first = [self._first(places[number]) for number in unread]
        read = self._members.read(first, self._kinds(views[0]))
        for number, sample, members in zip(unread, first, read):
            found[number] = self._next_good(places[number], sample, views[number], members)
        return found

    def _recall(self, place: int, view: View) -> _Sample | None:
        kept = self._kept.get(place)
        if kept is None or (view.size and (kept.picture is None or view.size != self._cache.shape[1:3])):
            return None
        return kept._replace(caption=self.caption(kept.text, kept.attributes, view.draw), is_decoded=False)

    def _first(self, place: int) -> int:
        """The sample to try at a place: the first that is not known to be bad."""
        sample = place if self._latents_shown is None else int(self._latents_shown[place])
        return self._skip_bad(sample)

    def _skip_bad(self, sample: int) -> int:
        if len(self._bad) == len(self.index):
            blame = self._accounting.blame()
            raise ConfigError(f"data: none of {len(self.index)} samples in a row can be read: {blame}")
        while sample in self._bad:
            sample = (sample + 1) % len(self.index)
        return sample

    def _next_good(self, place: int, sample: int, view: View, members: tuple[Member, ...] | BadSample) -> _Sample:
        """What stands at a place: this sample, whose members these are, or else the next that can be used."""
        while True:
            try:
                if isinstance(members, BadSample):
                    raise members
                found = self._use(sample, members, view)
                break
            except BadSample as bad:
                self._refuse(sample, bad)
            sample = self._skip_bad(sample)
            members = next(self._members.read([sample], self._kinds(view)))
        self._accounting.good(int(self.index.shard[sample]))
        if view.size and len(self._is_read):
            self._is_read[place] = True
        return self._keep(place, found) if place < self._num_cached else found

    def _use(self, sample: int, members: tuple[Member, ...], view: View) -> _Sample:
        text, attributes, *pictures = (None if member is None else bytes(member) for member in members)
        attributes = None if attributes is None else parse_json(attributes)
        caption = self.caption(text, attributes, view.draw)
        if view.size is None:
            return _Sample(sample, text, attributes, caption, None)
        companions = dict(zip(self._companions, pictures[1:]))
        picture = decode_pictures(pictures[0], companions, view, self.ground)
        return _Sample(sample, text, attributes, caption, picture, is_decoded=True)

    def _keep(self, place: int, found: _Sample) -> _Sample:
        if found.picture is not None:
            if found.picture.image.pixels.shape != self._cache.shape[1:]:
                return found
            self._cache[place] = found.picture.image.pixels
            image = found.picture.image._replace(pixels=self._cache[place])
            found = found._replace(picture=found.picture._replace(image=image))
        self._kept[place] = found
        return found

    def _refuse(self, sample: int, bad: BadSample) -> None:
        if sample in self._bad:  # met twice in one batch
            return
        self._bad[sample] = bad.reason
        offset = int(self.index.offset[sample].min())
        self._accounting.refuse(bad, int(self.index.shard[sample]), self.index.key[sample].decode(), offset)

    def _count(self, places: list[int], samples: list[_Sample]) -> None:
        for place, sample in zip(places, samples):
            if sample.shown != place:
                reason = self._bad.get(place, "replaced_in_latents")
                self._accounting.replaced(reason, int(self.index.shard[place]))
        for name, count in self._members.storage.take_counts().items():
            self._accounting.add(name, count)
        captions = [sample.caption for sample in samples]
        self._accounting.read(captions, sum(sample.is_decoded for sample in samples))

    def _kinds(self, view: View) -> tuple[int, ...]:
        companions = (COMPANIONS[name] for name in self._companions)
        return (CAPTION, JSON) if view.size is None else (CAPTION, JSON, IMAGE, *companions)
