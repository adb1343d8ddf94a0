"""Samples of shards that nobody has indexed, in lanes: each goes through its part of the shards, and never ends.

All lanes together take the shards of epoch 0, permuted, then those of epoch 1, and on: lane l of L the places l, l + L,
l + 2 L. A lane waits for no other, so every rank has as many batches as it asks for.
"""

from __future__ import annotations

import hashlib
import os
import random
from collections.abc import Iterator, Sequence
from contextlib import suppress
from functools import partial
from itertools import islice
from typing import Any, Literal, NamedTuple

import torch

from sdtrain.contracts import Batch
from sdtrain.data.accounting import Accounting
from sdtrain.data.address import shown
from sdtrain.data.attributes import parse_json
from sdtrain.data.bad_sample import BadSample
from sdtrain.data.caption import CaptionRule
from sdtrain.data.layout import CAPTION, COMPANIONS, IMAGE, JSON
from sdtrain.data.one_pass import Losses, Raw, read_shard
from sdtrain.data.order import permutation
from sdtrain.data.retry import Retry
from sdtrain.data.shard_index import Shard
from sdtrain.data.stream import Batches
from sdtrain.data.view import Pictures, View, check_crop, decode_pictures, draw_views, pictured
from sdtrain.errors import ConfigError
from sdtrain.ops.random import Draw

_MAX_IN_A_ROW = 10  # shards without a single sample
_AT_ONCE = 32  # samples whose random numbers are drawn together


class Placed(NamedTuple):
    """A sample, the shard it stands in, and the place of that shard in the endless order."""

    raw: Raw
    shard: int
    place: int


class Usable(NamedTuple):
    """A sample that can be trained on."""

    placed: Placed
    picture: Pictures
    caption: str
    attributes: dict[str, Any] | None
    sample_id: int
    epoch: int


class Lanes:
    """Reads a split's shards in lanes. Crop, flip and the choice among captions are drawn as `Reader` draws them.

    Args:
        addresses: of the shards.
        image_size: pictures are made square of this side, in pixels.
        num_workers: DataLoader workers that will count into the accounting.
        crop: what stands out of the square is cut "center" or at "random".
        flip: mirror half of the pictures.
        ground: what is seen through transparent pixels, as RGB.
        caption: which caption is told; None: the .txt member as it is.
        shuffle_samples: a lane chooses its next sample among so many, which it holds as they stand in the shard.
        max_bad_fraction: more bad samples than this among the last 10,000 end the run, and so do more broken shards.
        retry: of a read or a transfer that breaks.
    """

    def __init__(
        self,
        addresses: Sequence[str],
        image_size: int,
        num_workers: int = 0,
        crop: Literal["center", "random"] = "center",
        flip: bool = False,
        ground: tuple[int, int, int] = (255, 255, 255),
        caption: CaptionRule | None = None,
        shuffle_samples: int = 1000,
        max_bad_fraction: float = 0.01,
        retry: Retry | None = None,
    ) -> None:
        if shuffle_samples < 1:
            raise ConfigError(f"data.reader.shuffle_samples: {shuffle_samples}; give 1 for the order of the shards")
        self.shards, self.image_size = [Shard(address, 0, "") for address in addresses], image_size
        self.crop, self.flip, self.ground, self.seed = check_crop(crop), flip, tuple(ground), 0
        self.caption, self.shuffle_samples, self.retry = caption or CaptionRule(), shuffle_samples, retry or Retry()
        self.accounting = Accounting(self.shards, 1 << 62, num_workers, max_bad_fraction)
        self.losses = Losses(self.accounting, num_workers)
        self.companions: tuple[str, ...] = ()  # that batches carry, where samples have them

    def enter_worker(self, worker: int) -> None:
        """From here on this is the copy of a DataLoader worker: counts and files of its own."""
        self.accounting.enter_worker(worker)
        self.losses.enter(worker + 1)

    def endless(self, lane: int, num_lanes: int, start: int = 0) -> Iterator[Usable]:
        """A lane's samples, through webdataset's pipeline; the lanes together begin with place `start` of the order."""
        os.environ["WDS_SECURE"] = "1"  # read at import: no pipes, no pickles
        import webdataset

        chooser = random.Random(f"{self.seed}/{lane}/{num_lanes}/{start}")
        shards = partial(self._walk, start + lane, num_lanes)
        return iter(webdataset.DataPipeline(shards, webdataset.shuffle(self.shuffle_samples, rng=chooser), self.usable))

    def once(self) -> Iterator[Usable]:
        """Every sample, each once, in the order of epoch 0."""
        return self.usable(placed for place in range(len(self.shards)) for placed in self._at(place))

    def stored_texts(self) -> Iterator[tuple[bytes | None, dict[str, Any] | None]]:
        """The .txt and .json members in the order of epoch 0, without those that cannot be read."""
        for raw in (placed.raw for place in range(len(self.shards)) for placed in self._at(place)):
            with suppress(BadSample):
                yield raw.members[CAPTION], None if raw.members[JSON] is None else parse_json(raw.members[JSON])

    def usable(self, samples: Iterator[Placed]) -> Iterator[Usable]:
        """What can be trained on; the rest is counted and recorded, and the next takes its place."""
        while chunk := list(islice(samples, _AT_ONCE)):
            for view in self._views(chunk):
                try:
                    found = self._use(*view)
                except BadSample as bad:
                    placed = view[0]
                    self.accounting.replaced(bad.reason, placed.shard)
                    self.accounting.refuse(bad, placed.shard, placed.raw.key, placed.raw.offset)
                else:
                    self.accounting.good(view[0].shard)
                    yield found

    def batch(self, samples: Sequence[Usable]) -> Batch:
        """Their micro-batch."""
        captions = [sample.caption for sample in samples]
        self.accounting.read(captions, len(samples))
        return {
            **pictured([sample.picture for sample in samples]),
            "caption": captions,
            "attributes": [sample.attributes for sample in samples],
            "key": [self._name(sample.placed) for sample in samples],
            "sample_id": torch.tensor([sample.sample_id for sample in samples]),
            "epoch": torch.tensor([sample.epoch for sample in samples]),
        }

    def report(self) -> dict[str, int]:
        """What was read, replaced and lost, by reason, in this process and its workers."""
        return self.accounting.report() | self.losses.report()

    def _walk(self, place: int, step: int) -> Iterator[Placed]:
        num_empty = 0
        while True:
            num_empty += 1
            for placed in self._at(place):
                num_empty = 0
                yield placed
            if num_empty >= min(_MAX_IN_A_ROW, len(self.shards)):
                last = shown(self.shards[self._shard(place)].address)
                raise ConfigError(f"data: {num_empty} shards in a row have no sample, {last} last; see the lines above")
            place += step

    def _at(self, place: int) -> Iterator[Placed]:
        """The samples of the shard at a place of the endless order."""
        shard = self._shard(place)
        for raw in read_shard(shard, self.losses, self.retry):
            yield Placed(raw, shard, place)

    def _shard(self, place: int) -> int:
        epoch, place = divmod(place, len(self.shards))
        return int(permutation(len(self.shards), f"{self.seed}/sequential", 0, epoch)[place])

    def _views(self, chunk: list[Placed]) -> list[tuple[Placed, int, int, View]]:
        """With each sample its number, its epoch, and the view that is drawn for it: a function of the two."""
        # The whole address: two folders may have shards of one name.
        names = (f"{self.shards[placed.shard].address}\n{placed.raw.key}" for placed in chunk)
        digests = [hashlib.blake2b(name.encode(), digest_size=8).digest() for name in names]
        ids = [int.from_bytes(digest, "little") >> 1 for digest in digests]
        epochs = [placed.place // len(self.shards) for placed in chunk]
        draw, size = Draw(self.seed, torch.tensor(ids), torch.tensor(epochs)), (self.image_size, self.image_size)
        return list(zip(chunk, ids, epochs, draw_views(draw, len(chunk), size, self.crop, self.flip)))

    def _use(self, placed: Placed, sample_id: int, epoch: int, view: View) -> Usable:
        raw = placed.raw
        if raw.fault:
            raise BadSample(raw.fault)
        attributes = None if raw.members[JSON] is None else parse_json(raw.members[JSON])
        caption = self.caption(raw.members[CAPTION], attributes, view.draw)
        companions = {name: raw.members[COMPANIONS[name]] for name in self.companions}
        picture = decode_pictures(raw.members[IMAGE], companions, view, self.ground)
        return Usable(placed, picture, caption, attributes, sample_id, epoch)

    def _name(self, placed: Placed) -> str:
        return f"{self.shards[placed.shard].stem}/{placed.raw.key}"


class LaneStream(Batches):
    """One rank's micro-batches, endlessly. Rank and world are given: a forkserver worker cannot know them.

    Args:
        lanes: of the training split.
        micro_batch_size: samples in each.
        num_accumulate: micro-batches in an optimizer step.
        step: optimizer steps that are done.
        start: the place of the endless order that the lanes begin with.
    """

    def __init__(
        self,
        lanes: Lanes,
        micro_batch_size: int,
        num_accumulate: int = 1,
        step: int = 0,
        start: int = 0,
        rank: int = 0,
        world: int = 1,
    ) -> None:
        self.lanes, self.micro_batch_size, self.num_accumulate = lanes, micro_batch_size, num_accumulate
        self.step, self.start, self.rank, self.world = step, start, rank, world

    def enter_worker(self, worker: int) -> None:
        """From here on this is the copy of a DataLoader worker."""
        self.lanes.enter_worker(worker)

    def micro_batches(self, worker: int, num_workers: int) -> Iterator[Batch]:
        """This worker's. The cursor says where to begin when the step is done: past the
        shards that this lane has begun, and the others, which are about as far.
        """
        num_lanes = self.world * num_workers
        samples = self.lanes.endless(self.rank * num_workers + worker, num_lanes, self.start)
        number, newest = worker, self.start
        while True:
            part = list(islice(samples, self.micro_batch_size))
            newest = max(newest, *(sample.placed.place for sample in part))
            batch = self.lanes.batch(part)
            micro_batch = (self.step * self.num_accumulate + number) * self.world + self.rank
            batch["place"] = torch.arange(self.micro_batch_size) + micro_batch * self.micro_batch_size
            batch["cursor"] = {
                "step": self.step + number // self.num_accumulate + 1,
                "place": self.start + ((newest - self.start) // num_lanes + 1) * num_lanes,
            }
            batch["last_micro_of_step"] = number % self.num_accumulate == self.num_accumulate - 1
            yield batch
            number += num_workers
