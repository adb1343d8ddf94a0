"""Shards that nobody has indexed, read from front to back: what a stream or a server without ranges allows.

It resumes statistically only: a run that goes on meets the shards that were not begun yet, but not the samples, in the
order, that the run before it would have met. `data=webdataset` resumes exactly; it wants an index.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Collection, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any, Literal

import lightning as L
import numpy as np
from torch import Tensor

from sdtrain.contracts import Batch
from sdtrain.data.address import is_remote, scheme_of, shown
from sdtrain.data.caption_check import check_captions
from sdtrain.data.datamodule import check_fraction, refuse_late, say
from sdtrain.data.index import find_shards
from sdtrain.data.lane import Lanes, LaneStream, Usable
from sdtrain.data.layout import COMPANIONS
from sdtrain.data.quarantine import Quarantine
from sdtrain.data.source import Shards
from sdtrain.data.stream import Loader, check_batch, check_workers
from sdtrain.errors import ConfigError

_STATISTICAL = (
    "the shards are read in sequence, without an index: a run that is resumed goes on statistically only, not with the "
    "very samples it would have taken (tools/index_shards.py makes an index, data=webdataset reads by it)"
)


class SequentialDataModule(L.LightningDataModule):
    """Shards on disk, behind http(s) or s3, or written by commands, in one pass after the other.

    Nobody knows how many samples there are. The first of each split are kept, as they stand in the shard, for what
    asks for samples by their place: validation, previews, the statistics of latents, a tokenizer to learn.

    Args:
        shards: a .tar file, a glob, a folder, an address such as http://HOST/{00000..00123}.tar, or a list of these.
        val: shards for validation; or how much of `shards`, chosen by a hash of their names, at least one.
        image_size: pictures are scaled to cover and cropped to a square of this side, in pixels.
        reader: how samples are read, Lanes that lack their shards; None: as they do by default.
        num_held_samples: so many of each split are kept.
        allow_pipe: take addresses such as "pipe:aws s3 cp s3://B/{0..9}.tar -", which run that command, without a
            shell, on every node.
        num_workers: DataLoader workers; each is a lane.
        start_method: how they start; None: as the platform does.
    """

    same_on_every_rank = ("epoch", "resumes_exactly")  # of `accounting`, see `datamodule.py`

    def __init__(
        self,
        shards: Shards,
        val: float | Shards = 0.05,
        image_size: int = 64,
        reader: Callable[..., Lanes] | None = None,
        num_held_samples: int = 1000,
        allow_pipe: bool = False,
        num_workers: int = 0,
        start_method: Literal["fork", "forkserver", "spawn"] | None = None,
    ) -> None:
        super().__init__()
        check_fraction(val)
        check_workers(num_workers)
        self.shards, self.val, self.image_size, self._new_lanes = shards, val, image_size, reader or Lanes
        self.num_held_samples, self.allow_pipe = num_held_samples, allow_pipe
        self.num_workers, self.start_method = num_workers, start_method
        self._addresses: dict[str, list[str]] = {}
        self._lanes: dict[str, Lanes] = {}
        self._held: dict[str, list[Usable]] = {}
        self._order: tuple[int, int, int] | None = None
        self._directory: Path | None = None
        self._start()

    def _start(self) -> None:
        self._step, self._place, self._loader_built = 0, 0, False

    def connect(
        self, seed: int, global_batch_size: int, num_accumulate: int = 1, directory: Path | None = None
    ) -> None:
        """What the run knows and the configuration of the data does not. Starts a new fit at step 0.

        Args:
            directory: where the record of bad samples goes; None keeps none.
        """
        check_batch(global_batch_size, num_accumulate)
        self._order, self._directory = (seed, global_batch_size, num_accumulate), directory
        self._start()
        self._connect_lanes()

    def setup(self, stage: str | None = None) -> None:  # noqa: ARG002  Lightning's signature
        """Finds the shards; none is opened yet."""
        if self._lanes:
            return
        self._addresses = self._split()
        self._lanes["train"] = self._new_lanes(self._addresses["train"], self.image_size, self.num_workers)
        # the same pictures each time
        self._lanes["val"] = self._new_lanes(self._addresses["val"], self.image_size, crop="center", flip=False)
        self._connect_lanes()
        say(f"data: {_STATISTICAL}")

    def accompany(self, names: Collection[str]) -> None:
        """Batches carry those of the companions that are named, a mask where the sample has one.

        Raises:
            ConfigError: where captions are named, and the first samples have none.
        """
        self.setup()
        if "caption" in names:
            lanes = self._lanes["train"]
            if note := check_captions(lanes.caption, lanes.stored_texts(), "data.reader.caption"):
                say(f"data: {note}")
        for lanes in self._lanes.values():
            lanes.companions = tuple(name for name in COMPANIONS if name in names)
        self._held.clear()  # samples that were read without them

    @property
    def fingerprint(self) -> str:
        """sha256 of the training shards' names, which is all that is known of them."""
        self.setup()
        return hashlib.sha256("\n".join(self._addresses["train"]).encode()).hexdigest()

    @property
    def splits(self) -> dict[str, int]:
        """How many samples of every split are kept, and can be loaded."""
        return {split: len(self._keep(split)) for split in ("train", "val")}

    def load(self, split: str, positions: Sequence[int] | np.ndarray | Tensor, as_images: bool = False) -> Batch:  # noqa: ARG002  there are pictures only
        """Some of the samples that are kept, in the order asked for."""
        held, lanes = self._keep(split), self._lanes[split]
        chosen = [held[int(position)].placed for position in positions]
        return lanes.batch(list(lanes.usable(iter(chosen))))

    def captions(self, split: str) -> list[str]:
        """The captions of the samples that are kept."""
        return [sample.caption for sample in self._keep(split)]

    def attributes(self, split: str) -> list[dict[str, Any] | None]:
        """Their .json members, None where there is none."""
        return [sample.attributes for sample in self._keep(split)]

    def attach_latents(self, split: str, mean_std: Tensor, shown: Tensor | None = None) -> None:  # noqa: ARG002
        """Refused: nobody knows all the samples.

        Raises:
            ConfigError: always.
        """
        raise ConfigError(
            "diffusion.cache_latents: shards that are read in sequence have no list of samples; set "
            "diffusion.cache_latents=false, or index the shards and use data=webdataset"
        )

    def accounting(self) -> dict[str, int]:
        """Reads, replacements and losses by reason, of this process and its workers, and that a resume is not exact."""
        train, val = (self._lanes[split].report() for split in ("train", "val"))
        lost = {f"val/{name}": count for name, count in val.items() if name.startswith(("lost", "replaced/"))}
        return train | lost | {"epoch": self._place // len(self._addresses["train"]), "resumes_exactly": 0}

    def train_dataloader(self) -> Loader:
        """The endless stream, from about where the run before stopped."""
        rank, world = (self.trainer.global_rank, self.trainer.world_size) if self.trainer else (0, 1)
        _, size, num_accumulate = self._connected()
        if size % (world * num_accumulate):
            raise ConfigError(
                f"trainer.batch_size: {size} samples a step do not divide among {world} ranks x "
                f"{num_accumulate} micro-batches"
            )
        self.setup()
        self._tell(world * max(1, self.num_workers))
        self._loader_built = True
        micro_batch_size = size // (world * num_accumulate)
        stream = LaneStream(
            self._lanes["train"], micro_batch_size, num_accumulate, self._step, self._place, rank, world
        )
        return Loader(stream, self.num_workers, self.start_method)

    def advance(self, cursor: Mapping[str, int]) -> None:
        """An optimizer step is done; `cursor` came with its micro-batches."""
        self._step, self._place = cursor["step"], max(self._place, cursor["place"])

    def state_dict(self) -> dict[str, int]:
        """How many steps are done, and how many shards all lanes together have begun."""
        return {"step": self._step, "place": self._place}

    def load_state_dict(self, state_dict: Mapping[str, int]) -> None:
        """Go on with the shards that were not begun."""
        refuse_late(self._loader_built)
        self._step, self._place = int(state_dict["step"]), int(state_dict["place"])

    def _connected(self) -> tuple[int, int, int]:
        if self._order is None:
            raise RuntimeError("the data module needs connect(seed, global_batch_size, num_accumulate) first")
        return self._order

    def _connect_lanes(self) -> None:
        rank = self.trainer.global_rank if self.trainer else 0
        for split, lanes in self._lanes.items():
            lanes.seed = self._connected()[0] if split == "train" else 0
            lanes.accounting.quarantine = Quarantine(self._directory, rank)

    def _tell(self, num_lanes: int) -> None:
        """Says in the run's metrics, too, what this way of reading is."""
        num_shards = len(self._addresses["train"])
        if num_shards < num_lanes:
            say(
                f"data: {num_shards} shards for {num_lanes} lanes (ranks x workers): several lanes read the same shard "
                "at a time, so that a sample comes again soon after; more and smaller shards are better"
            )
        context = getattr(self.trainer.lightning_module, "context", None) if self.trainer else None
        if context is not None:
            context.tracker.log(
                {"stage": context.stage, "event": "data", "resume": "statistical", "text": _STATISTICAL}
            )

    def _keep(self, split: str) -> list[Usable]:
        """The first samples of a split, without their pictures, which are decoded again when they are asked for."""
        self.setup()
        if split not in self._lanes:
            raise ConfigError(f"data: no split '{split}'; there are {', '.join(self._lanes)}")
        if split not in self._held:
            first = islice(self._lanes[split].once(), self.num_held_samples)
            self._held[split] = [sample._replace(picture=None) for sample in first]
            if not self._held[split]:
                raise ConfigError(
                    f"data: no sample with an image in the {len(self._addresses[split])} shards for {split}, "
                    f"{shown(self._addresses[split][0])} first"
                )
        return self._held[split]

    def _split(self) -> dict[str, list[str]]:
        train = self._find(self.shards, "data.shards")
        if not isinstance(self.val, float):
            return {"train": train, "val": self._find(self.val, "data.val")}
        if len(train) == 1:
            say("data: there is one shard only; it is used for training and for validation")
            return {"train": train, "val": train}
        names = {address: shown(address).rpartition("/")[2] for address in train}
        by_hash = sorted(train, key=lambda one: (hashlib.blake2b(names[one].encode()).digest(), one))
        num_val = min(max(1, round(self.val * len(train))), len(train) - 1)
        return {"train": sorted(by_hash[num_val:]), "val": sorted(by_hash[:num_val])}

    def _find(self, shards: Shards, option: str) -> list[str]:
        """Every shard's address. Raises ConfigError where there is none, or one that is refused."""
        patterns = [str(one) for one in ([shards] if isinstance(shards, str | Path) else shards)]
        pipes = [pattern for pattern in patterns if scheme_of(pattern) == "pipe"]
        if pipes and not self.allow_pipe:
            raise ConfigError(
                f"{option}: '{pipes[0][:80]}' would run a command; give the address that it reads from, or set "
                "data.allow_pipe=true"
            )
        others = [pattern for pattern in patterns if pattern not in pipes]
        found = find_shards(others, option) if others or not pipes else []
        indexed = [address for address in found if not is_remote(address) and os.path.isdir(address)]
        if indexed:
            raise ConfigError(f"{option}: {indexed[0]} is an index; data=webdataset reads by it")
        return sorted({*found, *(address for pattern in pipes for address in _expand(pattern))})


def _expand(pattern: str) -> list[str]:
    """What a pipe with {00000..00123} stands for."""
    os.environ["WDS_SECURE"] = "1"  # read at import
    from webdataset.shardlists import expand_urls

    return list(expand_urls(pattern))
