"""Where every sample lies: a strict walk through local tar shards, kept beside each shard as `<shard>.index.npz`.

The index turns a shard into random access: byte offsets, sizes and checksums of each sample's image, .txt and .json
members. What the walk does not understand it refuses with a reason; what was lost stands in `losses`.
"""

from __future__ import annotations

import functools
import glob
import hashlib
import io
import json
import os
import zipfile
import zlib
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np
from PIL import Image

from sdtrain.data.caption import MAX_CAPTION_BYTES
from sdtrain.data.decode import FORMATS, MAX_IMAGE_BYTES
from sdtrain.data.tar import Defect, Member, walk
from sdtrain.errors import ConfigError

IMAGE, CAPTION, JSON = range(3)  # the columns of `offset`, `size` and `crc`
MAX_JSON_BYTES = 256 * 1024
MAX_BYTES = (MAX_IMAGE_BYTES, MAX_CAPTION_BYTES, MAX_JSON_BYTES)
ABSENT = -1
_KINDS = {"jpg": IMAGE, "jpeg": IMAGE, "png": IMAGE, "webp": IMAGE, "txt": CAPTION, "json": JSON}
_VERSION = 1
_ARRAYS = {"offset": np.int64, "size": np.int64, "crc": np.uint32, "side": np.int32, "key": np.bytes_}


class Loss(NamedTuple):
    """Something a shard holds, or held, that is no sample of the index."""

    shard: str
    reason: str
    count: int
    note: str


@dataclass(frozen=True, eq=False)
class Index:
    """N samples in some shards. A sample's number is its row."""

    shards: tuple[Path, ...]
    shard_bytes: tuple[int, ...]
    shard: np.ndarray  # (N,) int32, a place in `shards`
    offset: np.ndarray  # (N, 3) int64
    size: np.ndarray  # (N, 3) int64, ABSENT where the sample has no such member
    crc: np.ndarray  # (N, 3) uint32
    side: (
        np.ndarray
    )  # (N, 2) int32: width and height as stored, before any EXIF rotation; 0 where the header is unreadable
    key: np.ndarray  # (N,) bytes, UTF-8
    losses: tuple[Loss, ...] = ()

    def __len__(self) -> int:
        return len(self.shard)

    def name(self, sample: int) -> str:
        """ "shard/key", for people."""
        return f"{self.shards[self.shard[sample]].stem}/{self.key[sample].decode()}"

    def subset(self, samples: np.ndarray) -> Index:
        """Some of the samples, renumbered; the losses stay with the whole."""
        rows = {name: getattr(self, name)[samples] for name in ("shard", *_ARRAYS)}
        return Index(self.shards, self.shard_bytes, **rows)

    @functools.cached_property
    def fingerprint(self) -> str:
        """sha256 over shard names, shard sizes and sample records: the same data has it wherever it lies."""
        digest = hashlib.sha256()
        digest.update(json.dumps([[path.name, size] for path, size in zip(self.shards, self.shard_bytes)]).encode())
        for array, kind in ((self.shard, "<i4"), (self.offset, "<i8"), (self.size, "<i8"), (self.crc, "<u4")):
            digest.update(array.astype(kind).tobytes())
        digest.update(b"\n".join(self.key.tolist()))
        return digest.hexdigest()


def find_shards(shards: str | Path | Sequence[str | Path], option: str = "data.shards") -> list[Path]:
    """Paths, globs and folders -> the shards, sorted, each once."""
    found = set()
    for pattern in [shards] if isinstance(shards, (str, Path)) else list(shards):
        path = Path(pattern).expanduser()
        if path.is_dir():
            matches = list(path.glob("*.tar"))
        elif path.is_file():
            matches = [path]
        else:
            matches = [Path(match) for match in glob.glob(str(path)) if os.path.isfile(match)]
        if not matches:
            raise ConfigError(
                f"{option}: no shard matches '{pattern}' (looked from {Path.cwd()}). Give a .tar file, a folder of "
                "them, or a glob in quotes such as 'OUT/*.tar'; `python tools/make_shards.py FOLDER OUT` makes shards"
            )
        found.update(matches)
    if not found:
        raise ConfigError(f"{option}: the list is empty; give a .tar file, a folder of them, or a glob in quotes")
    return sorted(found)


def build_index(shards: Iterable[Path]) -> Index:
    """The index of some shards, from the files beside them where those are still true, else walked and saved."""
    shards = tuple(shards)
    parts, losses, sizes = [], [], []
    for number, path in enumerate(shards):
        arrays, about = _load(path) or _save(path, *_walk_shard(path))
        parts.append({**arrays, "shard": np.full(len(arrays["key"]), number, np.int32)})
        losses += [Loss(*loss) for loss in about["losses"]]
        sizes.append(about["bytes"])
    rows = {name: np.concatenate([part[name] for part in parts]) for name in ("shard", *_ARRAYS)}
    return Index(shards, tuple(sizes), **rows, losses=tuple(losses))


def index_path(shard: Path) -> Path:
    """Where a shard's index lies."""
    return shard.with_name(shard.name + ".index.npz")


def _stamp(path: Path) -> dict[str, int]:
    status = path.stat()
    return {"v": _VERSION, "bytes": status.st_size, "mtime_ns": status.st_mtime_ns}


def _load(shard: Path) -> tuple[dict[str, np.ndarray], dict[str, Any]] | None:
    """A saved index, or None when it is absent, damaged, or of another state of the shard."""
    try:
        with np.load(index_path(shard), allow_pickle=False) as file:
            about = dict(json.loads(str(file["about"])))
            arrays = {name: file[name] for name in _ARRAYS}
    except (OSError, ValueError, TypeError, KeyError, EOFError, zipfile.BadZipFile):
        return None
    stamp = _stamp(shard)
    whole = all(array.dtype.type is _ARRAYS[name] for name, array in arrays.items())
    whole = whole and len({len(array) for array in arrays.values()}) == 1
    whole = whole and {name: about.get(name) for name in stamp} == stamp
    inside = whole and (arrays["offset"] >= 0).all() and (arrays["offset"] + arrays["size"] <= stamp["bytes"]).all()
    return (arrays, about) if inside else None


def _save(
    shard: Path, arrays: dict[str, np.ndarray], about: dict[str, Any]
) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """Write it whole or not at all: other ranks may be reading or writing the same file."""
    path = index_path(shard)
    draft = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with draft.open("wb") as file:
            np.savez(file, about=np.array(json.dumps(about)), **arrays)
        os.replace(draft, path)
    except OSError:  # a folder that is not ours to write: the index stays in memory
        draft.unlink(missing_ok=True)
    return arrays, about


class _Sample:
    """The members of one key, while its shard is walked."""

    def __init__(self) -> None:
        self.offset, self.size, self.crc, self.side = [0] * 3, [ABSENT] * 3, [0] * 3, (0, 0)
        self.kinds: set[int] = set()
        self.fault = ""

    def add(self, kind: int, member: Member, file: BinaryIO) -> None:
        if kind in self.kinds:
            self.fault = "duplicate_member"
            return
        self.kinds.add(kind)
        self.offset[kind], self.size[kind] = member.offset, member.size
        if member.size <= MAX_BYTES[kind]:  # what is larger is refused by its size when it is read
            file.seek(member.offset)
            data = file.read(member.size)
            self.crc[kind] = zlib.crc32(data)
            if kind == IMAGE:
                self.side = _header_side(data)


def _header_side(data: bytes) -> tuple[int, int]:
    try:
        with Image.open(io.BytesIO(data), formats=FORMATS) as image:
            return image.size
    except Exception:  # the reader decodes it later and says why it is bad
        return (0, 0)


def _walk_shard(path: Path) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    about = _stamp(path)
    samples: dict[str, _Sample] = {}
    defect = None
    with path.open("rb") as file:
        try:
            for member in walk(file, about["bytes"]):
                folder, _, base = member.name.rpartition("/")
                stem, _, suffix = base.partition(".")  # as webdataset does: the key ends at the first dot
                kind = _KINDS.get(suffix.lower())
                if kind is not None and stem:
                    samples.setdefault(f"{folder}/{stem}" if folder else stem, _Sample()).add(kind, member, file)
        except Defect as found:
            defect = found
            if defect.offset == 0 and defect.reason != "cut_off":
                raise ConfigError(f"data.shards: {path} is not a tar shard ({defect})") from defect
    good, losses = _sort_out(samples, path.name, defect)
    arrays = {
        "offset": np.array([sample.offset for sample in good.values()], np.int64).reshape(-1, 3),
        "size": np.array([sample.size for sample in good.values()], np.int64).reshape(-1, 3),
        "crc": np.array([sample.crc for sample in good.values()], np.uint32).reshape(-1, 3),
        "side": np.array([sample.side for sample in good.values()], np.int32).reshape(-1, 2),
        "key": np.array([key.encode() for key in good], np.bytes_),
    }
    return arrays, {**about, "losses": losses}


def _sort_out(samples: dict[str, _Sample], shard: str, defect: Defect | None) -> tuple[dict[str, _Sample], list[Loss]]:
    """The samples to keep; for the others the reason. In a shard cut short, each needs all that the first one has."""
    wanted = {IMAGE}
    if defect:
        wanted = next(iter(samples.values())).kinds if len(samples) > 1 else {IMAGE, CAPTION}
    for key, sample in samples.items():
        if not key.isprintable() or len(key) > 255:
            sample.fault = "bad_key"
        elif IMAGE not in sample.kinds:
            sample.fault = sample.fault or "no_image"
        elif not wanted <= sample.kinds:
            sample.fault = sample.fault or "incomplete"
    faults = Counter(sample.fault for sample in samples.values() if sample.fault)
    losses = [Loss(shard, reason, count, "samples left out") for reason, count in faults.items()]
    good = {key: sample for key, sample in samples.items() if not sample.fault}
    if defect:
        losses.append(Loss(shard, defect.reason, 1, f"{defect}; the {len(good)} whole samples before it are used"))
    without = sum(CAPTION not in sample.kinds for sample in good.values())
    if without:
        losses.append(Loss(shard, "no_caption", without, "samples without .txt: their caption is empty"))
    return good, losses
