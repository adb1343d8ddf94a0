"""Shards -> splits, the training stream, and the cursor that a checkpoint keeps."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import lightning as L
import numpy as np
from lightning.pytorch.utilities.rank_zero import rank_zero_only
from torch import Tensor

from sdtrain.contracts import Batch
from sdtrain.data.bucket import Buckets, Table
from sdtrain.data.caption_check import NUM_LOOKED, check_captions
from sdtrain.data.plan import START, Cursor, Layout, Plan
from sdtrain.data.reader import Reader
from sdtrain.data.source import Corpus, Shards, Source, read_sources
from sdtrain.data.stream import Loader, Stream, check_batch, check_workers
from sdtrain.errors import ConfigError


class ShardDataModule(L.LightningDataModule):
    """Anybody's shards of images and captions.

    A subclass may write shards in `prepare_data` and add splits to `_shards`; a missing "val" is taken from "train".

    Args:
        shards: a .tar file, a glob, a folder of .tar files, or a list of these.
        sources: in its place, several of them by name: {name: {shards, weight, filter}}, see `source.py`.
        val: shards for validation; or how much of the training samples, chosen by a hash of the key, at most 2000.
        image_size: pictures are scaled to cover and cropped to a square of this side, in pixels.
        buckets: train on pictures of other shapes, too; None: squares. Validation has squares.
        reader: how pictures and captions are read, a Reader that lacks its index; None: as it does by default.
        num_workers: DataLoader workers; any number gives the same batches.
        start_method: how they start; None: as the platform does.
        cache_bytes: so much memory may hold decoded pictures when there are no workers.
        max_samples: train on the first so many alone.
    """

    # The first words of what `accounting` says of the whole run. Its other counts are each process's own.
    same_on_every_rank = ("lost", "filtered", "bucket", "rejected", "left_out", "epoch")
    _caption_option = "data.reader.caption"

    def __init__(
        self,
        shards: Shards | None = None,
        sources: Mapping[str, Mapping[str, Any]] | None = None,
        val: float | Shards = 0.05,
        image_size: int = 64,
        buckets: Buckets | None = None,
        reader: Callable[..., Reader] | None = None,
        num_workers: int = 0,
        start_method: Literal["fork", "forkserver", "spawn"] | None = None,
        cache_bytes: int = 1 << 30,
        max_samples: int | None = None,
    ) -> None:
        super().__init__()
        check_fraction(val)
        check_workers(num_workers)
        if (shards is None) == (sources is None):
            raise ConfigError("data: set one of data.shards and data.sources")
        self.image_size, self.buckets, self.max_samples = image_size, buckets, max_samples
        self.num_workers, self.start_method, self.cache_bytes = num_workers, start_method, cache_bytes
        self._new_reader = reader or Reader
        self._sources = None if sources is None else read_sources(sources)
        self._shards: dict[str, Shards] = {} if shards is None else {"train": shards}
        self._val_fraction = val if isinstance(val, float) else 0.0
        if not self._val_fraction:
            self._shards["val"] = val
        self._readers: dict[str, Reader] = {}
        self._order: tuple[int, int, int] | None = None
        self._start()

    def _start(self) -> None:
        self._plan: Plan | None = None
        self._cursor: Cursor = START
        self._loader_built = False

    def connect(
        self, seed: int, global_batch_size: int, num_accumulate: int = 1, directory: Path | None = None
    ) -> None:
        """What the run knows and the configuration of the data does not. Starts a new fit at step 0.

        Args:
            directory: where the record of bad samples goes; None keeps none.
        """
        check_batch(global_batch_size, num_accumulate)
        self._order = (seed, global_batch_size, num_accumulate)
        self._directory = directory
        self._start()
        self._connect_readers()

    def setup(self, stage: str | None = None) -> None:  # noqa: ARG002  Lightning's signature
        """Index the shards of every split. Several ranks may do this at once."""
        if self._readers:
            return
        self._corpus = self._describe()
        self._corpus.build(self._table(), self.max_samples)
        for note in self._corpus.notes:
            say(f"data: {note}")
        indices, left = self._corpus.indices, self.cache_bytes
        for split, index in indices.items():
            num_cached = min(len(index), left // (self.image_size**2 * 3))
            left -= num_cached * self.image_size**2 * 3
            if split == "train":
                how = {"num_cached": 0 if self.num_workers else num_cached, "num_workers": self.num_workers}
            else:
                how = {"num_cached": num_cached, "crop": "center", "flip": False}  # the same pictures each time
            self._readers[split] = self._new_reader(index, self.image_size, **how)
        self._connect_readers()

    def accompany(self, names: Collection[str]) -> None:
        """Batches carry those of the companions that are named, a mask where the sample has one.

        Raises:
            ConfigError: where no sample has what nothing stands in for, or a caption is named and none is found.
        """
        self.setup()
        if "caption" in names:
            reader = self._readers["train"]
            places = np.linspace(0, len(reader.index) - 1, min(NUM_LOOKED, len(reader.index))).astype(np.int64)
            if note := check_captions(reader.caption, reader.stored_texts(places), self._caption_option):
                say(f"data: {note}")
        for split, reader in self._readers.items():
            reader.accompany(names)
            if "source" in names and not reader.index.has("source"):
                raise ConfigError(f"data: no sample of {split} has a source, such as x.source.png beside x.png")
            if "mask" in names and not reader.index.has("mask"):
                say(f"data: no sample of {split} has a mask, such as x.mask.png beside x.png; masks are drawn")

    @property
    def num_train(self) -> int:
        """How many samples the training split has."""
        return len(self._reader("train").index)

    @property
    def fingerprint(self) -> str:
        """sha256 of the training split's index and, where they have names, of its sources."""
        own = self._reader("train").index.fingerprint
        if self._sources is None:
            return own
        named = [[order.name, len(order)] for order in self._corpus.orders()]
        return hashlib.sha256(json.dumps([own, named]).encode()).hexdigest()

    @property
    def splits(self) -> dict[str, int]:
        """The number of samples of every split."""
        self.setup()
        return {split: len(reader.index) for split, reader in self._readers.items()}

    def load(self, split: str, positions: Sequence[int] | np.ndarray | Tensor, as_images: bool = False) -> Batch:
        """The samples at some places of a split, in the order asked for.

        `as_images` gives pictures even where latents are attached.
        """
        ids = np.asarray(positions, np.int64)
        return self._reader(split).batch(ids, np.zeros_like(ids), as_images=as_images)

    def captions(self, split: str) -> list[str]:
        """The caption of every place."""
        return [caption for caption, _ in self._reader(split).texts()]

    def attributes(self, split: str) -> list[dict[str, Any] | None]:
        """The .json member of every place, None where there is none."""
        return [attributes for _, attributes in self._reader(split).texts()]

    def shown(self, split: str) -> Tensor:
        """(N,) int64: whose picture stands at each place: its own, or the next good sample's. Keep it by latents."""
        return self._reader(split).shown()

    def attach_latents(self, split: str, mean_std: Tensor, shown: Tensor | None = None) -> None:
        """Batches of loaders built from now on carry `latent`, row `sample_id` of `mean_std`; no picture is decoded.

        Args:
            split: which split.
            mean_std: (N, 2, C, h, w) float16, made of the batches that `load` gave for places 0 to N - 1.
            shown: what `shown(split)` said then; None finds it out, which decodes what was not read in this process.

        Raises:
            ConfigError: for pictures that are not the same square each time.
        """
        reader = self._reader(split)
        if reader.flip or reader.crop != "center" or (self.buckets is not None and split == "train"):
            raise ConfigError(
                "diffusion.cache_latents: latents in memory are of one square of each picture, and data.buckets, "
                "data.reader.crop or data.reader.flip asks for others; set diffusion.cache_latents=false"
            )
        reader.attach_latents(mean_std, shown)

    def accounting(self) -> dict[str, int | float]:
        """Reads, replacements and what was left out, each by reason, of this process and its workers; the samples of
        every bucket; how often each source was gone through.
        """
        self.setup()
        total = Counter({"read": 0, "replaced": 0})
        for reader in self._readers.values():
            total.update(reader.accounting())
        total.update(self._corpus.counts)
        return dict(total) | ({} if self._plan is None else self._plan.epochs(self._cursor))

    def train_dataloader(self) -> Loader:
        """The endless stream, from the place that was restored."""
        rank, world = self._place()
        plan, (_, _, num_accumulate) = self._planned(), self._connected()
        self._connect_readers()
        stream = Stream(self._reader("train"), plan, self._cursor, rank, world, num_accumulate)
        self._loader_built = True
        return Loader(stream, self.num_workers, self.start_method)

    def advance(self, cursor: Cursor) -> None:
        """An optimizer step is done; `cursor` came with its micro-batches. So prefetched batches do not count."""
        self._cursor = cursor

    def state_dict(self) -> dict[str, Any]:
        """Where the run stands, in consumed batches; the same on every rank."""
        return self._planned().state(self._cursor)

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Go on from a saved state. One of other data, seed or global batch is refused; other weights are taken up."""
        plan, cursor = self._make_plan(state_dict.get("buckets.cell")).resume(state_dict)
        refuse_late(self._loader_built)
        if plan.segments[-1].block > cursor["block"] or len(plan.segments) > len(state_dict["segments"]):
            weights = ", ".join(f"{order.name} {weight}" for order, weight in zip(plan.orders, plan.weights))
            say(f"data: other weights ({weights}) from block {plan.segments[-1].block} on; now in {cursor['block']}")
        self._plan, self._cursor = plan, cursor

    def _connected(self) -> tuple[int, int, int]:
        if self._order is None:
            raise RuntimeError("the data module needs connect(seed, global_batch_size, num_accumulate) first")
        return self._order

    def _connect_readers(self) -> None:
        if self._order is not None:
            for reader in self._readers.values():
                reader.connect(self._order[0], self._directory, self._place()[0])

    def _place(self) -> tuple[int, int]:
        return (self.trainer.global_rank, self.trainer.world_size) if self.trainer else (0, 1)

    def _describe(self) -> Corpus:
        sources = [Source("", self._shards["train"])] if self._sources is None else self._sources
        others = [Source(split, of, option=f"data.{split}") for split, of in self._shards.items() if split != "train"]
        return Corpus(sources, others, self._val_fraction)

    def _table(self) -> Table | None:
        return None if self.buckets is None else self.buckets.table(self.image_size)

    def _planned(self) -> Plan:
        if self._plan is None:
            self._plan = self._make_plan()
        return self._plan

    def _make_plan(self, cell: int | None = None) -> Plan:
        """The plan from the start; where the cells are not configured, they are those of the run before, `cell`."""
        index, layout = self._reader("train").index, None
        seed, size, num_accumulate = self._connected()
        if self.buckets is not None:
            cell = self.buckets.cell_of(size, self._place()[1], num_accumulate, cell)
            layout = Layout(self._table(), index, cell, self.buckets.sync == "group")
        weights = tuple(source.weight for source in self._corpus.sources)
        return Plan(self._corpus.orders(), seed, size, weights, self.fingerprint, layout)

    def _reader(self, split: str) -> Reader:
        self.setup()
        if split not in self._readers:
            raise ConfigError(f"data: no split '{split}'; there are {', '.join(self._readers)}")
        return self._readers[split]


def check_fraction(val: float | Shards) -> None:
    """Of `data.val`, where it is one. Raises ConfigError."""
    if isinstance(val, float) and not 0 < val < 1:
        raise ConfigError(f"data.val: {val} is not between 0 and 1")


def refuse_late(is_built: bool) -> None:
    """Raises RuntimeError where a state is restored after the training loader was built."""
    if is_built:
        raise RuntimeError(
            "the data state was restored after the training loader was built, which would train from step 0 again; "
            "something asked for the loader too early (trainer.estimated_stepping_batches does)"
        )


@rank_zero_only
def say(line: str) -> None:
    """To people, once."""
    print(line, flush=True)
