"""The index of many shards as one folder: `manifest.json`, a memory-mapped `.npy` a column, and `rejected.jsonl`.

The manifest says which shards, in which state, the columns were made of; a shard that has changed since is refused.
Whoever opens the folder reads the manifest and no sample, so that a hundred million of them open at once.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from sdtrain.data.address import is_remote
from sdtrain.data.download import find_version
from sdtrain.data.metadata import is_column
from sdtrain.data.shard_index import Shard, ShardIndex
from sdtrain.data.shard_walk import ARRAYS, Loss
from sdtrain.errors import ConfigError

MANIFEST, REJECTED = "manifest.json", "rejected.jsonl"
_VERSION = 1
_MAX_NAMES = 3


class ShardRecord(NamedTuple):
    """A shard as the manifest knows it."""

    shard: Shard
    num_samples: int
    sha256: str  # of its bytes
    digest: str  # of its rows


class Opened(NamedTuple):
    """A folder's content; arrays and columns stay on disk until they are read."""

    records: tuple[ShardRecord, ...]
    arrays: dict[str, np.ndarray]
    columns: dict[str, np.ndarray]
    losses: tuple[Loss, ...]
    fingerprint: str


def is_index_folder(path: str | Path) -> bool:
    """Whether a folder is an index, not a folder of shards."""
    return (Path(path) / MANIFEST).is_file()


def fingerprint_of(records: Iterable[ShardRecord]) -> str:
    """The same data has it wherever it lies, and whether its index is one folder or a file beside each shard."""
    known = [[r.shard.name, r.shard.num_bytes, r.num_samples, r.digest] for r in records]
    return hashlib.sha256(json.dumps(known).encode()).hexdigest()


def open_folder(folder: str | Path, refuses_changed: bool = True) -> Opened:
    """Raises ConfigError where the folder does not hold together, or a local shard is not what it was."""
    folder = Path(folder)
    try:
        about = json.loads((folder / MANIFEST).read_text())
        if about["v"] != _VERSION:
            raise ConfigError(f"{folder}: the index is of version {about['v']}, this is {_VERSION}; {_advice(folder)}")
        root = about["root"] if is_remote(about["root"]) else os.path.abspath(folder / about["root"])
        records = tuple(_record(root, entry) for entry in about["shards"])
        names = [name for name in about["columns"] if is_column(name)]
        columns = {name: _map(folder / f"column.{name}.npy") for name in names}
        arrays = {name: _map(folder / f"{name}.npy") for name in ("shard", *ARRAYS)}
        losses = tuple(Loss(*loss) for loss in about["losses"])
        fingerprint = about["fingerprint"]
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        if isinstance(error, ConfigError):
            raise
        raise ConfigError(f"{folder}: the index is damaged ({error!r}); {_advice(folder)}") from error
    num_samples = sum(record.num_samples for record in records)
    kinds = {"shard": np.int32, **{name: kind for name, (kind, _) in ARRAYS.items()}}
    fits = all(len(array) == num_samples for array in (*arrays.values(), *columns.values()))
    fits = fits and all(arrays[name].dtype.type is kind for name, kind in kinds.items())
    if not fits or fingerprint_of(records) != fingerprint:
        raise ConfigError(f"{folder}: {MANIFEST} and the columns beside it do not fit each other; {_advice(folder)}")
    if refuses_changed:
        _refuse_changed(folder, [record.shard for record in records])
    return Opened(records, arrays, columns, losses, fingerprint)


def write_folder(
    folder: Path, addresses: Sequence[str], load: Callable[[str], ShardIndex], root: str | None = None
) -> dict[str, Any]:
    """Put the shards' indexes together, and return the manifest. Shards that were refused stay out of it.

    Args:
        folder: where the index goes; one that is there is replaced.
        addresses: the shards, in the order of the samples.
        load: gives one shard's index; it is asked twice, since all of them need not fit into memory.
        root: the shards' folder as readers of the index will see it; None keeps local ones relative to `folder`.
    """
    (folder / MANIFEST).unlink(missing_ok=True)  # until all is written there is no index here
    records, kinds, losses = [], {"key": np.dtype("S1")}, []
    with (folder / REJECTED).open("w") as rejected:
        for index in map(load, addresses):
            losses += index.found.losses
            rejected.writelines(json.dumps(line) + "\n" for line in _rejections(index))
            if index.found.refused or not len(index.found.arrays["key"]):
                continue
            records.append(ShardRecord(index.shard, len(index.found.arrays["key"]), index.found.sha256, index.digest))
            for name, column in {"key": index.found.arrays["key"], **index.found.columns}.items():
                if name not in kinds or column.dtype.itemsize > kinds[name].itemsize:
                    kinds[name] = column.dtype  # words and keys differ in width
    if not records:
        raise ConfigError(f"{folder}: none of {len(addresses)} shards has a sample with an image; see {REJECTED} there")
    _write_columns(folder, records, kinds, load)
    stored_root, stored = _relative(folder, [record.shard for record in records], root)
    about = {
        "v": _VERSION,
        "tool": f"sdtrain {version('sdtrain')}",
        "fingerprint": fingerprint_of(records),
        "num_samples": sum(record.num_samples for record in records),
        "root": stored_root,
        "columns": sorted(kinds.keys() - {"key"}),
        "losses": merge_losses(losses),
        "shards": [
            {**shard._asdict(), "num_samples": record.num_samples, "sha256": record.sha256, "digest": record.digest}
            for shard, record in zip(stored, records)
        ],
    }
    draft = folder / f".{MANIFEST}"
    draft.write_text(json.dumps(about, indent=1))
    os.replace(draft, folder / MANIFEST)
    return about


def merge_losses(losses: Iterable[Loss]) -> tuple[Loss, ...]:
    """One a reason: thousands of shards have thousands of lines to tell, and no reader."""
    by_reason: dict[str, list[Loss]] = {}
    for loss in losses:
        by_reason.setdefault(loss.reason, []).append(loss)
    merged = []
    for reason, same in by_reason.items():
        more = f" and {len(same) - 1} more" if len(same) > 1 else ""
        merged.append(Loss(f"{same[0].shard}{more}", reason, sum(loss.count for loss in same), same[0].note))
    return tuple(merged)


def _rejections(index: ShardIndex) -> Iterator[dict[str, Any]]:
    if index.found.refused:
        yield {"shard": index.shard.name, "key": None, "offset": 0, "reason": index.found.refused}
    yield from (rejection._asdict() for rejection in index.found.rejections)


def _write_columns(
    folder: Path, records: list[ShardRecord], kinds: Mapping[str, np.dtype], load: Callable[[str], ShardIndex]
) -> None:
    num_samples = sum(record.num_samples for record in records)

    def create(name: str, kind: Any, width: int = 1) -> np.ndarray:
        shape = (num_samples, width) if width > 1 else (num_samples,)
        return np.lib.format.open_memmap(folder / f"{name}.npy", "w+", kind, shape)

    rows = {name: create(name, kinds.get(name, kind), width) for name, (kind, width) in ARRAYS.items()}
    columns = {name: create(f"column.{name}", kind) for name, kind in kinds.items() if name != "key"}
    shard, first = create("shard", np.int32), 0
    for number, record in enumerate(records):
        here = slice(first, first := first + record.num_samples)
        index = load(record.shard.address)
        if (index.shard, index.digest) != (record.shard, record.digest):
            raise ConfigError(f"{record.shard.name} changed while it was indexed; run index_shards.py again")
        shard[here] = number
        for name, array in rows.items():
            array[here] = index.found.arrays[name]
        for name, column in columns.items():
            missing = b"" if kinds[name].kind == "S" else np.nan
            column[here] = index.found.columns.get(name, missing)
    for array in (shard, *rows.values(), *columns.values()):
        array.flush()


def _relative(folder: Path, shards: list[Shard], root: str | None) -> tuple[str, list[Shard]]:
    """The shards' root as readers of the index will see it, and the shards under it."""
    if any(is_remote(shard.address) for shard in shards):
        if root is not None:
            raise ConfigError(f"--root: {root!r} is for local shards; those of an address are kept as they are")
        return "", shards
    common = os.path.commonpath([os.path.dirname(shard.address) for shard in shards])
    stored = [shard._replace(address=os.path.relpath(shard.address, common)) for shard in shards]
    if root is not None and is_remote(root):  # nobody knows the version there
        stored = [shard._replace(version="") for shard in stored]
    return (os.path.relpath(common, folder) if root is None else root), stored


def _record(root: str, entry: dict[str, Any]) -> ShardRecord:
    address = entry["address"]
    if not is_remote(address):
        address = f"{root.rstrip('/')}/{address}" if is_remote(root) else os.path.join(root, address)
    shard = Shard(address, int(entry["num_bytes"]), str(entry["version"]))
    return ShardRecord(shard, int(entry["num_samples"]), str(entry["sha256"]), str(entry["digest"]))


def _map(path: Path) -> np.ndarray:
    """Mapped, and a plain array: numpy's own class for it takes microseconds more a look-up."""
    return np.load(path, mmap_mode="r", allow_pickle=False).view(np.ndarray)


def _refuse_changed(folder: Path, shards: Sequence[Shard]) -> None:
    """A shard that cannot be told is left to the reader, which compares what it opens."""
    changed = []
    for shard in shards:
        if is_remote(shard.address):
            continue
        try:
            if find_version(shard.address) != (shard.num_bytes, shard.version):
                changed.append(f"{shard.address} is not what it was (its size or its time)")
        except OSError as error:
            changed.append(f"{shard.address} cannot be read ({error.strerror})")
    if changed:
        more = f" and {len(changed) - _MAX_NAMES} more" if len(changed) > _MAX_NAMES else ""
        raise ConfigError(f"{folder}: {'; '.join(changed[:_MAX_NAMES])}{more}; {_advice(folder)}")


def _advice(folder: Path) -> str:
    return (
        f"index again: python tools/index_shards.py SHARDS --out {folder}; or, where the shards were only copied, "
        f"python tools/index_shards.py --verify {folder}"
    )
