"""Latents of a frozen first stage on disk: how they are written, shard by shard, and found again.

A folder has `latents.json`, which says of what and by what they were made; the index of the samples; `table.npy`, a row
a sample; and in `parts` a file a shard, in which all that is known of a sample stands together: its latent's mean and
std in float16, unscaled, those of the mirrored picture where they are kept, its caption and its .json member. One look
into a mapped file reads a sample. A part counts once its .json is there, which is written last.

A row holds the checksums of what it leads to, which whoever reads it verifies, and last its own: no flipped bit is
trained on.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
from zlib_ng.zlib_ng import crc32

from sdtrain.data.attributes import parse_json
from sdtrain.data.bad_sample import BadSample
from sdtrain.data.bucket import Table
from sdtrain.data.caption import clean_caption
from sdtrain.data.decode import Decoded, decode_image
from sdtrain.data.index import Index
from sdtrain.data.layout import CAPTION, IMAGE, JSON
from sdtrain.data.members import Members
from sdtrain.data.sealed import commit, draft, read_sealed, save_array, write_sealed
from sdtrain.data.shard_index import Shard
from sdtrain.data.shard_walk import ARRAYS
from sdtrain.data.storage import Storage
from sdtrain.errors import ConfigError

ABOUT, JOB, TABLE = "latents.json", "job.json", "table.npy"
PREPROCESSING = 1  # another number wherever decode.py gives other pixels: no cache of before is taken then
ROW = np.dtype(
    [
        ("sample", "<i8"),  # its number in the index of the source
        ("part", "<i4"),
        ("offset", "<i8"),  # in bytes
        ("size", "<i4", 2),  # height and width of the latent
        ("caption_bytes", "<i4"),  # -1: there is none
        ("json_bytes", "<i4"),
        ("original_size", "<i4", 2),
        ("crop_top_left", "<i4", (2, 2)),  # of the picture, and of the mirrored one
        ("crc", "<u4", 4),  # of the latent, the mirrored one, the caption with the .json, and the row before this
    ]
)

_Stored = tuple[np.ndarray, bytes]  # a sample's row and its bytes
Encode = Callable[[np.ndarray], np.ndarray]  # uint8 (B, H, W, 3) -> float16 (B, 2, C, h, w), mean and std


class PartWriter:
    """Writes the parts of a cache; any process may write any part, and the bytes are the same.

    Args:
        folder: of the cache.
        index: the samples.
        table: the shapes that pictures take; None: squares of `image_size`.
        encode: pictures to latents.
        batch: how many pictures of a height and width are encoded together.
        has_flips: keep the latents of the mirrored pictures, which are not the mirrored latents.
    """

    def __init__(
        self,
        folder: Path,
        index: Index,
        image_size: int,
        table: Table | None,
        encode: Encode,
        batch: Callable[[int, int], int],
        has_flips: bool = False,
    ) -> None:
        self.folder, self.index, self.encode, self.batch = folder, index, encode, batch
        self.image_size, self.table, self.has_flips = image_size, table, has_flips
        self._members = Members(index, Storage())

    def write(self, part: int) -> None:
        """The part of one shard, unless it is there."""
        first, last = np.searchsorted(self.index.shard, (part, part + 1))
        bad: Counter[str] = Counter()
        write_part(self.folder, part, self._samples(np.arange(first, last), bad), ROW, bad, order="sample")

    def _samples(self, samples: np.ndarray, bad: Counter[str]) -> Iterator[_Stored]:
        shapes = np.zeros(len(samples), np.uint8) if self.table is None else self.table.of(self.index.side[samples])
        known = [(self.image_size, self.image_size)] if self.table is None else self.table.shapes
        bad["no_bucket"] = int((shapes >= len(known)).sum())
        for number, (height, width) in enumerate(known):
            of_shape, at_once = samples[shapes == number], self.batch(height, width)
            for first in range(0, len(of_shape), at_once):
                yield from self._batch(of_shape[first : first + at_once], (height, width), bad)

    def _batch(self, samples: np.ndarray, size: tuple[int, int], bad: Counter[str]) -> Iterator[_Stored]:
        good = []
        for sample, members in zip(samples.tolist(), self._members.read(samples, (IMAGE, CAPTION, JSON))):
            try:
                if isinstance(members, BadSample):
                    raise members
                image, caption, told = (None if member is None else bytes(member) for member in members)
                if caption is not None:
                    clean_caption(caption)
                if told is not None:
                    parse_json(told)
                good.append((sample, caption, told, self._views(image, size)))
            except BadSample as error:
                bad[error.reason] += 1
        if not good:
            return
        views = [np.stack([one[3][mirrored].pixels for one in good]) for mirrored in range(1 + self.has_flips)]
        latents = [self.encode(pixels) for pixels in views]
        for number, (sample, caption, told, seen) in enumerate(good):
            yield self._stored(sample, caption, told, seen, [latent[number] for latent in latents])

    def _views(self, image: bytes, size: tuple[int, int]) -> list[Decoded]:
        return [decode_image(image, *size, flip=bool(mirrored)) for mirrored in range(1 + self.has_flips)]

    def _stored(
        self, sample: int, caption: bytes | None, told: bytes | None, seen: list[Decoded], latents: list[np.ndarray]
    ) -> _Stored:
        if not all(np.isfinite(latent).all() for latent in latents):
            raise ConfigError(
                f"{self.index.name(sample)}: its latent is not finite in float16; is the first stage well?"
            )
        row = np.zeros(1, ROW)
        row["sample"], row["size"] = sample, latents[0].shape[2:]
        row["caption_bytes"] = -1 if caption is None else len(caption)
        row["json_bytes"] = -1 if told is None else len(told)
        row["original_size"] = seen[0].original_size
        row["crop_top_left"][0, : len(seen)] = [one.crop_top_left for one in seen]
        views, text = [latent.tobytes() for latent in latents], (caption or b"") + (told or b"")
        row["crc"][0, : len(views)] = [crc32(view) for view in views]
        row["crc"][0, 2] = crc32(text)
        return row, b"".join([*views, text])


def write_part(
    folder: Path, part: int, samples: Iterator[_Stored], kind: np.dtype, bad: Counter[str], order: str | None = None
) -> None:
    """A part of such rows, unless it is there.

    Args:
        bad: why samples were left out, once all have come.
        order: the field that the rows are sorted by; None: as they come.
    """
    data, rows, about = part_paths(folder, part)
    if about.exists():
        return
    found, digest, offset = [np.zeros(0, kind)], hashlib.sha256(), 0
    with draft(data).open("wb") as file:
        for row, stored in samples:
            row["part"], row["offset"] = part, offset
            row["crc"][0, -1] = crc32(row.tobytes()[:-4])
            found.append(row)
            file.write(stored)
            digest.update(stored)
            offset += len(stored)
        commit(file, data)
    table = np.concatenate(found)
    save_array(rows, table if order is None else np.sort(table, order=order))
    write_sealed(
        about, {"num_bytes": offset, "sha256": digest.hexdigest(), "num_samples": len(table), "left_out": dict(bad)}
    )


def intact(rows: np.ndarray) -> list[bool]:
    """Of each row whether it is what was written."""
    data, width, expected = rows.tobytes(), rows.dtype.itemsize, rows["crc"][:, -1].tolist()
    return [crc32(data[n * width : (n + 1) * width - 4]) == crc for n, crc in enumerate(expected)]


def part_paths(folder: Path, part: int) -> tuple[Path, Path, Path]:
    """Of a part: its samples, its rows, and what is said of it."""
    return tuple(folder / "parts" / f"{part:06d}.{kind}" for kind in ("bin", "npy", "json"))


def start(folder: Path, job: Mapping[str, Any]) -> None:
    """Begins a cache, or goes on with one.

    Raises:
        ConfigError: where the one that was begun there is of something else, naming it.
    """
    (folder / "parts").mkdir(parents=True, exist_ok=True)
    if (folder / JOB).exists():
        require_same(read_sealed(folder / JOB), job, f"{folder} holds other latents")
    else:
        write_sealed(folder / JOB, job)


def finish(folder: Path, index: Index, job: Mapping[str, Any]) -> dict[str, Any]:
    """Puts the parts together, once all are there; returns the content of latents.json."""
    told, tables = [], []
    for part in range(len(index.shards)):
        _, rows, about = part_paths(folder, part)
        told.append(read_sealed(about))
        tables.append(np.load(rows, allow_pickle=False))
    table = np.concatenate(tables)
    if not len(table):
        raise ConfigError(f"{folder}: none of {len(index)} samples has a picture that can be encoded")
    kept = index.subset(table["sample"])
    arrays = {"table": table} | {f"index.{name}": getattr(kept, name) for name in ("shard", *ARRAYS)}
    for name, array in arrays.items():
        save_array(folder / f"{name}.npy", array)
    about = {
        **job,
        "tool": f"sdtrain {version('sdtrain')}",
        "num_samples": len(table),
        "fingerprint": kept.fingerprint,
        "left_out": dict(sum((Counter(one["left_out"]) for one in told), Counter())),
        "shards": [list(shard) for shard in kept.shards],
        "parts": [{name: one[name] for name in ("num_samples", "num_bytes", "sha256")} for one in told],
        "index_crc": {name: crc32(arrays[f"index.{name}"].tobytes()) for name in ("shard", *ARRAYS)},
    }
    write_sealed(folder / ABOUT, about)
    return about


def read_about(folder: Path) -> dict[str, Any]:
    """The content of latents.json. Raises ConfigError where there is none."""
    try:
        about = read_sealed(folder / ABOUT)
    except OSError as error:
        unfinished = "; it is not finished: start the tool again, it goes on" if (folder / JOB).exists() else ""
        raise ConfigError(
            f"data.folder: {folder} holds no latents that tools/precompute_latents.py made ({error}){unfinished}"
        ) from error
    require_same(about, {"preprocessing": PREPROCESSING}, f"data.folder: {folder} holds latents of other pictures")
    return about


def read_index(folder: Path, about: Mapping[str, Any]) -> Index:
    """The index of the samples that have latents; column `latent_row` has their places in the table."""
    arrays = {name: _checked(folder / f"index.{name}.npy", about["index_crc"][name]) for name in ("shard", *ARRAYS)}
    shards = tuple(Shard(*shard) for shard in about["shards"])
    return Index(
        shards, **arrays, columns={"latent_row": np.arange(about["num_samples"])}, fingerprint=about["fingerprint"]
    )


def _checked(path: Path, crc: int) -> np.ndarray:
    try:
        array = np.load(path, allow_pickle=False)
    except (OSError, ValueError, SyntaxError) as error:
        raise ConfigError(f"data.folder: {path} cannot be read ({error}); make the latents again") from error
    if crc32(array.tobytes()) != crc:
        raise ConfigError(f"data.folder: {path} is not what was written; it is damaged: make the latents again")
    return array


def require_same(theirs: Mapping[str, Any], ours: Mapping[str, Any], what: str) -> None:
    """Raises ConfigError naming the first field that differs, of what stands in `ours`."""
    for name, value in ours.items():
        if isinstance(value, Mapping) and isinstance(theirs.get(name), Mapping):
            require_same(theirs[name], value, what)
        elif theirs.get(name) != value:
            raise ConfigError(f"{what}: {name} is {theirs.get(name)} there, {value} here")


def find_damage(folder: Path, about: Mapping[str, Any]) -> list[str]:
    """The parts whose bytes are not those that were written, as `about` tells."""
    found = []
    for part, told in enumerate(about["parts"]):
        path = part_paths(folder, part)[0]
        with path.open("rb") as file:
            if hashlib.file_digest(file, "sha256").hexdigest() != told["sha256"]:
                found.append(str(path))
    return found
