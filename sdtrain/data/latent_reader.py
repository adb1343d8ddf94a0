"""Reading stored latents and captions by number, out of mapped files, each verified by its checksum."""

from __future__ import annotations

import functools
import mmap
import os
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from zlib_ng.zlib_ng import crc32

from sdtrain.contracts import Batch
from sdtrain.data.address import is_remote
from sdtrain.data.attributes import parse_json
from sdtrain.data.bad_sample import BadSample
from sdtrain.data.caption import CaptionRule
from sdtrain.data.index import Index
from sdtrain.data.latent_file import ROW, TABLE, intact, part_paths
from sdtrain.data.reader import Attributes, Reader
from sdtrain.data.text_file import FOLDER, StoredText
from sdtrain.errors import ConfigError

_MAX_OPEN_PARTS = 256  # a mapping keeps a file descriptor

# Of a sample the latent's bytes, the caption as it is, and the attributes; None where a checksum does not fit
_Stored = tuple[np.ndarray, bytes | None, Attributes] | None


class LatentReader(Reader):
    """Latents and captions by number; pictures too, as long as the shards they came from are there.

    What is not what was written, by its checksum, is replaced by the next sample of the same shape: a function of the
    place and the view alone, so that every process and every resumed run makes the same replacement.

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
        text: the text.json of the embeddings that batches carry, by the encoder's folder.
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
        text: Mapping[str, Mapping[str, Any]] | None = None,
    ) -> None:
        super().__init__(index, image_size, num_cached, num_workers, crop, flip, caption=caption)
        self.folder, self.about, self.text = folder, about, text or {}
        self._broken: set[int] = set()  # what this process has told of
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
        self._text = {name: self._open_text(name, told) for name, told in self.text.items()}
        self._stem = functools.cache(lambda shard: self.index.shards[shard].stem)  # half of a batch's time otherwise

    def _open_text(self, name: str, told: Mapping[str, Any]) -> StoredText:
        here = self.folder / FOLDER / name
        return StoredText(here, told, functools.lru_cache(_MAX_OPEN_PARTS)(functools.partial(_map, here, told)))

    def take_text(self, names: Collection[str]) -> None:
        """Batches carry these encoders' embeddings only."""
        self.text = {name: self.text[name] for name in names}
        self._open()

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
        factor, (flips, draws) = self.about["first_stage"]["down_factor"], self._drawn(ids, epochs)
        shown, stored = self._standing(ids, flips, None if size is None else (size[0] // factor, size[1] // factor))
        rows = self._table[self._rows[shown]]
        height, width = rows["size"][0].tolist()
        if (rows["size"] != (height, width)).any():
            raise ConfigError("data.folder: latents of several shapes cannot stand in one batch")
        shape = (2, self._channels, height, width)
        latents, captions, attributes = np.empty((len(ids), 2 * int(np.prod(shape))), np.uint8), [], []
        for number, (data, caption, told) in enumerate(stored):
            latents[number] = data
            captions.append(self.caption(caption, told, draws[number]))
            attributes.append(told)
        for place in ids[shown != ids]:
            self._accounting.replaced("crc_mismatch", int(self.index.shard[place]))
        self._accounting.read(captions)
        mirrored = np.array(flips, np.int64)
        texts = {
            f"{kind}/{name}": torch.from_numpy(value)
            for name, text in self._text.items()
            for kind, value in text.read(self._rows[shown]).items()
        }
        return {
            **texts,
            "latent": torch.from_numpy(latents.view(np.float16).reshape(len(ids), *shape)),  # (B, 2, C, h, w)
            "caption": captions,
            "attributes": attributes,
            "key": [
                f"{self._stem(shard)}/{key.decode()}"
                for shard, key in zip(self.index.shard[shown].tolist(), self.index.key[shown].tolist())
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
        _, stored = self._standing(places, [False] * len(places), None, False)
        return [(self.caption(text, told, draw), told) for draw, (_, text, told) in zip(draws, stored)]

    def stored_texts(self, places: np.ndarray) -> Iterator[tuple[bytes | None, Attributes]]:
        """The captions and attributes that are stored for some places, without those that are broken."""
        stored = self._stored(places, [False] * len(places), has_latents=False)
        return ((text, told) for _, text, told in filter(None, stored))

    def latent_size(self, sample: int) -> tuple[int, int]:
        """Height and width of one sample's latent."""
        return tuple(self._table[self._rows[sample]]["size"].tolist())

    def _drawn(self, ids: np.ndarray, epochs: np.ndarray) -> tuple[list[bool], list[float]]:
        """What is mirrored, and what chooses among captions: as any reader draws them, and only if it matters."""
        if not self.flip and set(self.caption.fields) == {"txt"}:
            return [False] * len(ids), [0.0] * len(ids)
        views = self._views(ids, epochs, (self.image_size, self.image_size))
        return [view.flip for view in views], [view.draw for view in views]

    def _standing(
        self, ids: np.ndarray, flips: Sequence[bool], size: tuple[int, int] | None, has_latents: bool = True
    ) -> tuple[np.ndarray, list[_Stored]]:
        """The samples that stand at some places, and what is stored of them. `size` is that of their latents."""
        shown, stored = ids.copy(), list(self._stored(ids, flips, has_latents))
        for number, found in enumerate(stored):
            place = int(ids[number])
            if found is None:
                self._refuse(place, BadSample("crc_mismatch", "of the latent cache"))
                shown[number], stored[number] = self._stand_in(place, flips[number], size, has_latents)
            self._accounting.good(int(self.index.shard[shown[number]]))
        return shown, stored

    def _stand_in(self, place: int, flip: bool, size: tuple[int, int] | None, has_latents: bool) -> tuple[int, _Stored]:
        side = self.image_size // self.about["first_stage"]["down_factor"]
        for sample in ((place + step) % len(self.index) for step in range(1, len(self.index))):
            if self.latent_size(sample) != (size or (side, side)):
                continue
            found = next(self._stored(np.array([sample]), [flip], has_latents))
            if found is not None:
                return sample, found
            self._refuse(sample, BadSample("crc_mismatch", "of the latent cache"))
        raise ConfigError(
            f"data.folder: {self.folder} has no whole sample to put in the place of {self.index.name(place)}, whose "
            "checksum does not fit; make the latents again"
        )

    def _refuse(self, sample: int, bad: BadSample) -> None:
        if sample not in self._broken:
            self._broken.add(sample)
            offset = int(self._table[self._rows[sample]]["offset"])
            self._accounting.refuse(bad, int(self.index.shard[sample]), self.index.key[sample].decode(), offset)

    def _stored(self, ids: np.ndarray, flips: Sequence[bool], has_latents: bool = True) -> Iterator[_Stored]:
        """What is stored of each sample, mirrored or not; without latents their bytes are not looked at."""
        numbers = self._rows[ids]
        rows = self._table[numbers]
        whole = intact(rows)
        for text in self._text.values():
            whole = [one and other for one, other in zip(whole, text.intact(numbers))]
        sizes = 4 * self._channels * rows["size"].prod(axis=1)
        fields = (rows["part"], rows["offset"], sizes, rows["caption_bytes"], rows["json_bytes"], rows["crc"])
        for is_whole, flip, part, offset, size, caption, told, crc in zip(whole, flips, *(f.tolist() for f in fields)):
            if not is_whole:
                yield None
                continue
            data, text = self._part(part), offset + size * self._num_views
            end = text + max(caption, 0)
            latent = np.frombuffer(data, np.uint8, size * has_latents, offset + size * flip)
            if (has_latents and crc32(latent) != crc[flip]) or crc32(data[text : end + max(told, 0)]) != crc[2]:
                yield None
                continue
            yield (
                latent,
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
