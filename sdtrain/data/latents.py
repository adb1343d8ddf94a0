"""Training on latents that tools/precompute_latents.py has made: the plan, stream and cursor of any shards, but a batch
carries `latent`, and no picture is read.
"""

from __future__ import annotations

import functools
import mmap
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch

from sdtrain.contracts import Batch
from sdtrain.data.address import is_remote
from sdtrain.data.attributes import parse_json
from sdtrain.data.bucket import Buckets
from sdtrain.data.caption import CaptionRule
from sdtrain.data.datamodule import ShardDataModule
from sdtrain.data.index import Index
from sdtrain.data.latent_file import ROW, TABLE, part_paths, read_about, read_index, require_same
from sdtrain.data.reader import Attributes, Reader
from sdtrain.data.source import Corpus
from sdtrain.data.text_file import FOLDER, StoredText, read_text_about
from sdtrain.errors import ConfigError

_MAX_OPEN_PARTS = 256  # a mapping keeps a file descriptor


class LatentReader(Reader):
    """Latents and captions by number; pictures too, as long as the shards they came from are there.

    Args:
        index: the samples, of a cache.
        folder: the cache.
        about: its latents.json.
        image_size: of the pictures, in pixels.
        num_cached: of the pictures that are read, the first so many samples' stay in memory.
        num_workers: DataLoader workers that will count into the accounting.
        crop: as the cache has it.
        flip: show half of the pictures mirrored, by the second latents.
        caption: which caption is told; None: the .txt member as it is.
        text: the text.json of the embeddings that batches carry; None: they carry none.
    """

    def __init__(
        self,
        index: Index,
        image_size: int,
        folder: Path,
        about: Mapping[str, Any],
        num_cached: int = 0,
        num_workers: int = 0,
        crop: Literal["center"] = "center",
        flip: bool = False,
        caption: CaptionRule | None = None,
        text: Mapping[str, Any] | None = None,
    ) -> None:
        super().__init__(index, image_size, num_cached, num_workers, crop, flip, caption=caption)
        self.folder, self.about, self.text = folder, about, text
        self._channels = about["first_stage"]["latent_channels"]
        self._num_views = 1 + about["has_flips"]
        self._open()
        self.has_pictures = all(is_remote(shard.address) or os.path.exists(shard.address) for shard in index.shards)

    _opened = ("_part", "_stem", "_table", "_text")  # one process's

    def _open(self) -> None:
        table = np.load(self.folder / TABLE, mmap_mode="r", allow_pickle=False).view(np.ndarray)
        if table.dtype != ROW or len(table) != self.about["num_samples"]:
            raise ConfigError(f"data.folder: {self.folder / TABLE} does not fit latents.json; it is damaged")
        self._table, self._rows = table, self.index.columns["latent_row"]
        self._part = functools.lru_cache(_MAX_OPEN_PARTS)(functools.partial(_map, self.folder, self.about))
        self._text = None
        if self.text is not None:
            open_part = functools.partial(_map, self.folder / FOLDER, self.text)
            self._text = StoredText(self.folder, self.text, functools.lru_cache(_MAX_OPEN_PARTS)(open_part))
        self._stem = functools.cache(lambda shard: self.index.shards[shard].stem)  # half of a batch's time otherwise

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in super().__getstate__().items() if name not in self._opened}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._open()

    def batch(
        self, ids: np.ndarray, epochs: np.ndarray, size: tuple[int, int] | None = None, as_images: bool = False
    ) -> Batch:
        """The samples at some places, all of one size. `as_images` gives pictures where there still are any."""
        if as_images and self.has_pictures:
            return super().batch(ids, epochs, size, as_images=True)
        ids, epochs = np.asarray(ids, np.int64), np.asarray(epochs, np.int64)
        rows = self._table[self._rows[ids]]
        height, width = rows["size"][0].tolist()
        if (rows["size"] != (height, width)).any():
            raise ConfigError("data.folder: latents of several shapes cannot stand in one batch")
        shape = (2, self._channels, height, width)
        num_bytes = 2 * int(np.prod(shape))
        latents, captions, attributes = np.empty((len(ids), num_bytes), np.uint8), [], []
        flips, draws = self._drawn(ids, epochs)
        for number, (data, caption, told) in enumerate(self._stored(rows, flips, num_bytes)):
            latents[number] = data
            captions.append(self.caption(caption, told, draws[number]))
            attributes.append(told)
        self._accounting.read(len(ids))
        mirrored = np.array(flips, np.int64)
        factor = self.about["first_stage"]["down_factor"]
        told = {} if self._text is None else self._text.read(self._rows[ids])
        return {
            **{name: torch.from_numpy(value) for name, value in told.items()},
            "latent": torch.from_numpy(latents.view(np.float16).reshape(len(ids), *shape)),  # (B, 2, C, h, w)
            "caption": captions,
            "attributes": attributes,
            "key": [
                f"{self._stem(shard)}/{key.decode()}"
                for shard, key in zip(self.index.shard[ids].tolist(), self.index.key[ids].tolist())
            ],
            "sample_id": torch.from_numpy(ids),
            "epoch": torch.from_numpy(epochs),
            "original_size": torch.from_numpy(rows["original_size"].astype(np.int64)),  # (B, 2)
            "crop_top_left": torch.from_numpy(rows["crop_top_left"][np.arange(len(ids)), mirrored].astype(np.int64)),
            "target_size": torch.tensor([[height * factor, width * factor]] * len(ids)),  # (B, 2)
        }

    def texts(self) -> list[tuple[str, Attributes]]:
        """Caption and attributes of every place."""
        places = np.arange(len(self.index))
        draws = [view.draw for view in self._views(places, places * 0, None)]
        stored = self._stored(self._table[self._rows], [False] * len(places), 0)
        return [(self.caption(text, told, draw), told) for draw, (_, text, told) in zip(draws, stored)]

    def latent_size(self, sample: int) -> tuple[int, int]:
        """Height and width of one sample's latent."""
        return tuple(self._table[self._rows[sample]]["size"].tolist())

    def _drawn(self, ids: np.ndarray, epochs: np.ndarray) -> tuple[list[bool], list[float]]:
        """What is mirrored, and what chooses among captions: as any reader draws them, and only if it matters."""
        if not self.flip and set(self.caption.fields) == {"txt"}:
            return [False] * len(ids), [0.0] * len(ids)
        views = self._views(ids, epochs, (self.image_size, self.image_size))
        return [view.flip for view in views], [view.draw for view in views]

    def _stored(
        self, rows: np.ndarray, flips: Sequence[bool], num_bytes: int
    ) -> Iterator[tuple[np.ndarray, bytes | None, Attributes]]:
        """Of each row the first bytes of the latent, mirrored or not, the caption as it is, and the attributes."""
        sizes = 4 * self._channels * rows["size"].prod(axis=1)
        fields = (rows["part"], rows["offset"], sizes, rows["caption_bytes"], rows["json_bytes"])
        for flip, part, offset, size, caption, told in zip(flips, *(field.tolist() for field in fields)):
            data, text = self._part(part), offset + size * self._num_views
            end = text + max(caption, 0)
            yield (
                np.frombuffer(data, np.uint8, num_bytes, offset + size * flip),
                None if caption < 0 else data[text:end],
                None if told < 0 else parse_json(data[end : end + told]),
            )


def _map(folder: Path, about: Mapping[str, Any], part: int) -> mmap.mmap:
    path = part_paths(folder, part)[0]
    try:
        with path.open("rb") as file:
            data = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    except (OSError, ValueError) as error:
        raise ConfigError(f"data.folder: {path} cannot be read ({error}); make the latents again") from error
    if len(data) != about["parts"][part]["num_bytes"]:
        raise ConfigError(f"data.folder: {path} is cut off; make the latents again")
    return data


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
        self.text = read_text_about(self.folder, self.about) if self._takes_text else None
        if self.text is not None and self._caption not in (None, CaptionRule()):
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
        """Refuses what is not the text encoder that made the embeddings, naming the field."""
        require_same(
            {"encoder": self.text["encoder"]},
            {"encoder": encoder},
            f"data.folder: {self.folder / FOLDER} is of another text encoder (data.text=false takes none)",
        )

    def pairs(self, num: int, seed: int) -> Iterator[tuple[Batch, Batch]]:
        """Some training samples, drawn by the seed: each as it is stored, and as its picture is read now.

        None where the pictures are gone.
        """
        reader = self._reader("train")
        if not reader.has_pictures:
            return
        factor = self.about["first_stage"]["down_factor"]
        for place in np.random.default_rng(seed).integers(len(reader.index), size=num):
            ids, (height, width) = np.array([place]), reader.latent_size(int(place))
            size = (height * factor, width * factor)
            yield reader.batch(ids, ids * 0), reader.batch(ids, ids * 0, size, as_images=True)

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
