"""Shards -> splits, the training stream, and the cursor that a checkpoint keeps."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
from lightning.pytorch.utilities.rank_zero import rank_zero_only
from torch import Tensor

from sdtrain.contracts import Batch
from sdtrain.data.index import Index, build_index, find_shards
from sdtrain.data.plan import Plan
from sdtrain.data.reader import Reader
from sdtrain.data.stream import Loader, Stream
from sdtrain.errors import ConfigError

_MAX_VAL_SAMPLES = 2000

Shards = str | Path | Sequence[str | Path]


class ShardDataModule(L.LightningDataModule):
    """Anybody's shards of images and captions.

    A subclass may write shards in `prepare_data` and add splits to `_shards`; a missing "val" is taken from "train".

    Args:
        shards: a .tar file, a glob, a folder of .tar files, or a list of these.
        val_shards: the same for validation; None takes a part of `shards`, chosen by a hash of the key.
        val_fraction: how much of `shards` that part is; at least 1 sample, at most 2000.
        image_size: pictures are scaled to cover and cropped to a square of this side, in pixels.
        num_workers: DataLoader workers; any number gives the same batches.
        cache_bytes: so much memory may hold decoded pictures when there are no workers.
        max_bad_fraction: more bad samples than this among the last thousand end the run.
        max_samples: train on the first so many alone.
    """

    def __init__(
        self,
        shards: Shards,
        val_shards: Shards | None = None,
        val_fraction: float = 0.05,
        image_size: int = 64,
        num_workers: int = 0,
        cache_bytes: int = 1 << 30,
        max_bad_fraction: float = 0.1,
        max_samples: int | None = None,
    ) -> None:
        super().__init__()
        if not 0 < val_fraction < 1:
            raise ConfigError(f"data.val_fraction: {val_fraction} is not between 0 and 1")
        self.image_size, self.num_workers, self.cache_bytes = image_size, num_workers, cache_bytes
        self.val_fraction, self.max_bad_fraction, self.max_samples = val_fraction, max_bad_fraction, max_samples
        self._shards: dict[str, Shards] = {"train": shards}
        if val_shards is not None:
            self._shards["val"] = val_shards
        self._readers: dict[str, Reader] = {}
        self._losses: Counter[str] = Counter()
        self._order: tuple[int, int, int] | None = None
        self._step = 0
        self._loader_built = False

    def connect(self, seed: int, global_batch_size: int, num_accumulate: int = 1) -> None:
        """What the run knows and the configuration of the data does not. Starts a new fit at step 0."""
        self._order = (seed, global_batch_size, num_accumulate)
        self._step = 0
        self._loader_built = False

    def setup(self, stage: str | None = None) -> None:  # noqa: ARG002  Lightning's signature
        """Index the shards of every split. Several ranks may do this at once."""
        if self._readers:
            return
        indices = {split: self._index(split) for split in self._shards}
        if "val" not in indices:
            indices["train"], indices["val"] = self._split(indices["train"])
        if self.max_samples is not None:
            indices["train"] = indices["train"].subset(np.arange(min(self.max_samples, len(indices["train"]))))
        left = self.cache_bytes
        for split, index in indices.items():
            num_cached = min(len(index), left // (self.image_size**2 * 3))
            left -= num_cached * self.image_size**2 * 3
            num_workers = self.num_workers if split == "train" else 0
            self._readers[split] = Reader(
                index, self.image_size, 0 if num_workers else num_cached, self.max_bad_fraction, num_workers
            )

    @property
    def num_train(self) -> int:
        """How many samples the training split has."""
        return len(self._reader("train").index)

    @property
    def fingerprint(self) -> str:
        """sha256 of the training split's index."""
        return self._reader("train").index.fingerprint

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
        return self._reader(split).batch(ids, np.zeros_like(ids), as_images)

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
        """
        self._reader(split).attach_latents(mean_std, shown)

    def accounting(self) -> dict[str, int]:
        """Reads, replacements by reason, and what the shards lost by reason; this process's and its workers'."""
        total = Counter({"read": 0, "replaced": 0})
        for reader in self._readers.values():
            total.update(reader.accounting())
        total.update(self._losses)
        return dict(total)

    def train_dataloader(self) -> Loader:
        """The endless stream, from the step that was restored."""
        rank, world = (self.trainer.global_rank, self.trainer.world_size) if self.trainer else (0, 1)
        _, _, num_accumulate = self._connected()
        stream = Stream(self._reader("train"), self._plan(), self._step, rank, world, num_accumulate)
        self._loader_built = True
        return Loader(stream, self.num_workers)

    def advance(self, cursor: Mapping[str, Any]) -> None:
        """An optimizer step is done; `cursor` came with its micro-batches. So prefetched batches do not count."""
        self._step = int(cursor["step"])

    def state_dict(self) -> dict[str, Any]:
        """Where the run stands, in consumed batches; the same on every rank."""
        return self._plan().state(self._step)

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Go on from a saved state. One of other data, seed or global batch is refused."""
        step = self._plan().step_of(state_dict)
        if self._loader_built:
            raise RuntimeError(
                "the data state was restored after the training loader was built, which would train from step 0 again; "
                "something asked for the loader too early (trainer.estimated_stepping_batches does)"
            )
        self._step = step

    def _connected(self) -> tuple[int, int, int]:
        if self._order is None:
            raise RuntimeError("the data module needs connect(seed, global_batch_size, num_accumulate) first")
        return self._order

    def _plan(self) -> Plan:
        seed, global_batch_size, _ = self._connected()
        return Plan(self.num_train, seed, global_batch_size, self.fingerprint)

    def _reader(self, split: str) -> Reader:
        self.setup()
        if split not in self._readers:
            raise ConfigError(f"data: no split '{split}'; there are {', '.join(self._readers)}")
        return self._readers[split]

    def _index(self, split: str) -> Index:
        option = "data.shards" if split == "train" else f"data.{split}_shards"
        index = build_index(find_shards(self._shards[split], option))
        for loss in index.losses:
            self._losses[f"lost/{loss.reason}"] += loss.count
            _say(f"data: {loss.shard}: {loss.reason} {loss.count} ({loss.note})")
        if not len(index):
            raise ConfigError(
                f"{option}: no sample with an image in {len(index.shards)} shards, {index.shards[0]} first"
            )
        return index

    def _split(self, index: Index) -> tuple[Index, Index]:
        if len(index) == 1:
            _say("data: there is one sample only; it is used for training and for validation")
            return index, index
        num_val = min(max(1, round(self.val_fraction * len(index))), _MAX_VAL_SAMPLES, len(index) - 1)
        hashes = [hashlib.blake2b(key, digest_size=8).digest() for key in index.key.tolist()]
        order = np.argsort(np.array(hashes, "S8").view(">u8"), kind="stable")
        return index.subset(np.sort(order[num_val:])), index.subset(np.sort(order[:num_val]))


@rank_zero_only
def _say(line: str) -> None:
    print(line, flush=True)
