"""Training on latents that tools/precompute_latents.py has made: the plan, stream and cursor of any shards, but a batch
carries `latent`, and no picture is read.
"""

from __future__ import annotations

import functools
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any, Literal

import numpy as np

from sdtrain.contracts import Batch
from sdtrain.data.bucket import Buckets
from sdtrain.data.caption import CaptionRule
from sdtrain.data.datamodule import ShardDataModule
from sdtrain.data.index import Index
from sdtrain.data.latent_file import TABLE, read_about, read_index, require_same
from sdtrain.data.latent_reader import LatentReader
from sdtrain.data.source import Corpus
from sdtrain.data.text_file import FOLDER, read_text_about
from sdtrain.errors import ConfigError


class LatentDataModule(ShardDataModule):
    """Latents of a frozen first stage, made once by tools/precompute_latents.py; the trainer refuses another's.

    With buckets, the samples held out for validation are those of them that are squares.

    Args:
        folder: what the tool made.
        val: how much of the samples is held out, chosen by a hash of the key, at most 2000.
        image_size: of the pictures that were encoded, in pixels.
        flip: mirror half of the pictures, which the tool must have been asked for.
        caption: which caption is told; None: the .txt member as it is.
        text: take the text embeddings that the cache has, if any, instead of encoding captions again and again.
        cell: samples of one bucket that stand together, as `data.buckets.cell`.
        num_workers, start_method, max_samples: as for any shards.
    """

    _caption_option = "data.caption"

    def __init__(
        self,
        folder: str,
        val: float = 0.05,
        image_size: int = 64,
        flip: bool = False,
        caption: CaptionRule | None = None,
        text: bool = True,
        cell: int | None = None,
        num_workers: int = 0,
        start_method: Literal["fork", "forkserver", "spawn"] | None = None,
        max_samples: int | None = None,
    ) -> None:
        super().__init__(
            folder,
            val=val,
            image_size=image_size,
            num_workers=num_workers,
            start_method=start_method,
            max_samples=max_samples,
        )
        if caption is not None and caption.empty == "drop":
            raise ConfigError("data.caption.empty: stored latents have no sample to put in the place of one; leave it")
        self.folder, self.flip, self.cell, self._caption = Path(folder).expanduser(), flip, cell, caption
        self._takes_text = text

    def setup(self, stage: str | None = None) -> None:
        """Opens the cache."""
        if self._readers:
            return
        self.about = read_about(self.folder)
        require_same(self.about, {"image_size": self.image_size}, "data.image_size is not that of the latents")
        if self.flip and not self.about["has_flips"]:
            raise ConfigError("data.flip: there are no latents of mirrored pictures; make them with --flips")
        if self.about["buckets"] is not None:
            self.buckets = Buckets(**self.about["buckets"], cell=self.cell)
        self.text = read_text_about(self.folder, self.about) if self._takes_text else {}
        if self.text and self._caption not in (None, CaptionRule()):
            raise ConfigError(
                "data.caption: the stored text embeddings are of the .txt members as they are; set data.text=false to "
                "encode other captions"
            )
        self._new_reader = functools.partial(
            LatentReader, folder=self.folder, about=self.about, flip=self.flip, caption=self._caption, text=self.text
        )
        super().setup(stage)

    def require(self, first_stage: Mapping[str, Any]) -> None:
        """Refuses what is not the first stage that made the latents, naming the field."""
        require_same(
            {"first_stage": self.about["first_stage"]},
            {"first_stage": first_stage},
            f"data.folder: {self.folder} holds latents of another first stage",
        )

    def require_text(self, encoder: Mapping[str, Any]) -> None:
        """Refuses what is not a text encoder that made the embeddings, naming the field."""
        told = [one["encoder"] for one in self.text.values()]
        nearest = next((one for one in told if one["weight_hash"] == encoder["weight_hash"]), told[0])
        require_same(
            {"encoder": nearest},
            {"encoder": encoder},
            f"data.folder: {self.folder / FOLDER} is of another text encoder (data.text=false takes none)",
        )

    def take_text(self, names: Collection[str]) -> None:
        """Batches carry these encoders' embeddings only, as `text_states/NAME` and so on."""
        self.text = {name: self.text[name] for name in names}
        for reader in self._readers.values():
            reader.take_text(names)

    def pairs(self, num: int, seed: int) -> Iterator[tuple[Batch, Batch]]:
        """Some training samples, drawn by the seed: each as it is stored, and as its picture is read now.

        None where the pictures are gone.
        """
        reader = self._reader("train")
        if not reader.has_pictures:
            return
        factor = self.about["first_stage"]["down_factor"]
        for place in np.random.default_rng(seed).integers(len(reader.index), size=num):
            ids = np.array([place])
            stored = reader.batch(ids, ids * 0)
            if stored["key"][0] == reader.index.name(int(place)):  # else another stands for it
                size = tuple(side * factor for side in stored["latent"].shape[3:])
                yield stored, reader.batch(ids, ids * 0, size, as_images=True)

    def _describe(self) -> Corpus:
        corpus = super()._describe()
        return _Cached(corpus.sources, corpus.others, corpus.val_fraction, folder=self.folder, about=self.about)


class _Cached(Corpus):
    """The samples of a cache."""

    def __init__(self, *args: Any, folder: Path, about: Mapping[str, Any]) -> None:  # noqa: ANN401 as a Corpus
        super().__init__(*args)
        self.folder, self.about = folder, about

    def _index(self, source: Any) -> Index:  # noqa: ANN401, ARG002  there is one
        self.counts.update({f"left_out/{reason}": count for reason, count in self.about["left_out"].items()})
        return read_index(self.folder, self.about)

    def _hold_out(self, index: Index) -> tuple[Index, Index]:
        train, val = super()._hold_out(index)
        if self.about["buckets"] is None:
            return train, val
        table = np.load(self.folder / TABLE, mmap_mode="r", allow_pickle=False)
        side = self.about["image_size"] // self.about["first_stage"]["down_factor"]
        is_square = (table["size"][val.columns["latent_row"]] == side).all(axis=1)
        if not is_square.any():
            raise ConfigError("data.val: none of the held-out samples is a square; raise data.val")
        return train, val.subset(is_square)
