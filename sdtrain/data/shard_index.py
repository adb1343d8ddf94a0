"""One shard's index: what a walk through it found, kept beside a local shard as `<shard>.index.npz`."""

from __future__ import annotations

import hashlib
import json
import os
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from sdtrain.data.address import is_remote, shown
from sdtrain.data.download import find_version, open_address
from sdtrain.data.img2dataset import MAX_TABLE_BYTES, read_table, table_address
from sdtrain.data.metadata import COMPANION_COLUMNS
from sdtrain.data.shard_walk import ARRAYS, Check, Loss, Rejection, Walked, walk_shard
from sdtrain.errors import ConfigError

_VERSION = 4
_IDENTITY = ("offset", "size", "crc", "side")  # with the keys, what the fingerprint covers
_COLUMN = "column/"  # how the metadata's columns are called in the file


class Shard(NamedTuple):
    """A tar file: an absolute local path or an http(s) or s3 address; `version` is "" where nobody knows it."""

    address: str
    num_bytes: int
    version: str

    @property
    def name(self) -> str:
        """The file's name."""
        return shown(self.address).rpartition("/")[2]

    @property
    def stem(self) -> str:
        """The file's name without its suffix."""
        return Path(self.name).stem


class ShardIndex(NamedTuple):
    """A shard and what it holds."""

    shard: Shard
    found: Walked
    digest: str  # sha256 of the rows, see `digest_rows`


def index_path(shard: str | Path) -> Path:
    """Where a local shard's index lies."""
    return Path(f"{shard}.index.npz")


def index_shard(address: str, folder: Path | None = None, check: Check | None = None) -> ShardIndex:
    """A shard's index: a saved one that is still true, else walked and saved.

    It is saved beside the shard, or in `folder` where that is remote or not ours to write. With `check` every picture
    is looked at, and what the reader would refuse is left out. Raises OSError, or ConfigError where it is remote.
    """
    places = [] if is_remote(address) else [index_path(address)]
    if folder is not None:
        places.append(folder / f"{hashlib.sha256(address.encode()).hexdigest()[:32]}.index.npz")
    stamp = _stamp(address)
    for place in places:
        found = _load(place, address, stamp, check is not None)
        if found is not None:
            return found
    shard = Shard(address, stamp["bytes"], stamp["version"])
    with open_address(*shard) as file:
        found = walk_shard(file, shard.name, shard.num_bytes, check)
    if stamp["table"] is not None:
        found = _with_table(found, shard, *stamp["table"])
    if _stamp(address) != stamp:
        raise OSError(f"{shard.name} changed while it was read")
    index = ShardIndex(shard, found, digest_rows(found.arrays, found.columns))
    any(_save(place, index, {**stamp, "deep": check is not None}) for place in places)
    return index


def digest_rows(arrays: Mapping[str, np.ndarray], columns: Mapping[str, np.ndarray]) -> str:
    """sha256 of the rows that say which bytes are which sample, however wide the keys are stored."""
    digest = hashlib.sha256()
    for name in _IDENTITY:
        digest.update(arrays[name].tobytes())
    for name in (name for names in COMPANION_COLUMNS.values() for name in names if name in columns):
        if not np.isnan(columns[name]).all():  # another shard's, in an index folder
            digest.update(columns[name].tobytes())
    digest.update(b"\n".join(arrays["key"].tolist()))
    return digest.hexdigest()


def _with_table(found: Walked, shard: Shard, num_bytes: int, version: str) -> Walked:
    """What img2dataset's table says comes before what the .json members say; what it misses is told."""
    address, table = table_address(shard.address), None
    if num_bytes <= MAX_TABLE_BYTES:
        with open_address(address, num_bytes, version) as file:
            table = read_table(file.read(), shown(address), found.arrays["key"].tolist())
    if table is None:
        loss = Loss(shard.name, "foreign_table", 1, f"{shown(address)} is no table of img2dataset's; not used")
        return found._replace(losses=(*found.losses, loss))
    losses = []
    if table.num_missing:
        note = "successful downloads of the table that the shard does not have"
        losses.append(Loss(shard.name, "missing_sample", table.num_missing, note))
    if table.num_unknown:
        losses.append(Loss(shard.name, "not_in_table", table.num_unknown, "samples without a row: filters miss them"))
    return found._replace(columns={**found.columns, **table.columns}, losses=(*found.losses, *losses))


def _stamp(address: str) -> dict[str, Any]:
    num_bytes, version = find_version(address)
    try:
        table = list(find_version(table_address(address)))
    except (OSError, ConfigError):  # a server that has none may also say that we may not read it
        table = None
    return {"v": _VERSION, "bytes": num_bytes, "version": version, "table": table}


def _load(path: Path, address: str, stamp: dict[str, Any], is_deep: bool) -> ShardIndex | None:
    """A saved index, or None when it is absent, damaged, of another state of the shard, or less deep than wanted."""
    try:
        with np.load(path, allow_pickle=False) as file:
            about = dict(json.loads(str(file["about"])))
            arrays = {name: file[name] for name in ARRAYS}
            columns = {name[len(_COLUMN) :]: file[name] for name in file.files if name.startswith(_COLUMN)}
    except (OSError, ValueError, TypeError, KeyError, EOFError, zipfile.BadZipFile):
        return None
    whole = all(array.dtype.type is ARRAYS[name][0] for name, array in arrays.items())
    whole = whole and len({len(array) for array in (*arrays.values(), *columns.values())}) == 1
    whole = whole and {name: about.get(name) for name in stamp} == stamp and (about["deep"] or not is_deep)
    if not whole or digest_rows(arrays, columns) != about["digest"]:
        return None
    losses = tuple(Loss(*loss) for loss in about["losses"])
    rejections = tuple(Rejection(*rejection) for rejection in about["rejections"])
    found = Walked(arrays, columns, losses, rejections, about["sha256"], about["refused"])
    return ShardIndex(Shard(address, stamp["bytes"], stamp["version"]), found, about["digest"])


def _save(path: Path, index: ShardIndex, stamp: dict[str, Any]) -> bool:
    """Write it whole or not at all: other ranks may be reading or writing the same file. False where nobody may."""
    arrays, columns, losses, rejections, sha256, refused = index.found
    about = {**stamp, "losses": losses, "rejections": rejections, "sha256": sha256, "refused": refused}
    about["digest"] = index.digest
    draft = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with draft.open("wb") as file:
            named = {_COLUMN + name: column for name, column in columns.items()}
            np.savez(file, about=np.array(json.dumps(about)), **arrays, **named)
        os.replace(draft, path)
    except OSError:  # a folder that is not ours to write
        draft.unlink(missing_ok=True)
        return False
    return True
