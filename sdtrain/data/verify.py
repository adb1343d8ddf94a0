"""An index folder against its shards, byte by byte: what a copy or a disk did to either is told by name."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

from sdtrain.data.address import shown
from sdtrain.data.download import find_version, open_address
from sdtrain.data.manifest import MANIFEST, ShardRecord, open_folder
from sdtrain.data.shard_index import digest_rows
from sdtrain.data.tar import Tape
from sdtrain.errors import ConfigError


def verify_folder(folder: Path, num_workers: int, on_done: Callable[[], None] = lambda: None) -> list[str]:
    """What does not agree, a line a shard. Shards with the same bytes and another date get that into the manifest."""
    opened = open_folder(folder, refuses_changed=False)
    firsts = np.cumsum([0, *(record.num_samples for record in opened.records)])

    def check(number: int) -> tuple[str, str]:
        record, rows = opened.records[number], slice(firsts[number], firsts[number + 1])
        try:
            found = {name: column[rows] for name, column in {**opened.columns, **opened.arrays}.items()}
            return _check(record, found, number)
        except (OSError, ConfigError) as error:
            return f"{shown(record.shard.address)}: {error}", ""
        finally:
            on_done()

    with ThreadPoolExecutor(num_workers) as pool:
        results = list(pool.map(check, range(len(opened.records))))
    faults = [fault for fault, _ in results if fault]
    if not faults and any(found != r.shard.version for (_, found), r in zip(results, opened.records)):
        _write_versions(folder / MANIFEST, [version for _, version in results])
    return faults


def _check(record: ShardRecord, rows: dict[str, np.ndarray], number: int) -> tuple[str, str]:
    """Why it does not agree, and the version that was found."""
    name = shown(record.shard.address)
    if digest_rows(rows, rows) != record.digest or (rows["shard"] != number).any():
        return f"{name}: its rows in the index are damaged", ""
    num_bytes, version = find_version(record.shard.address)
    if num_bytes != record.shard.num_bytes:
        return f"{name}: {num_bytes} bytes, {record.shard.num_bytes} were indexed", ""
    with open_address(record.shard.address, num_bytes, version) as file:
        if Tape(file).sha256() != record.sha256:
            return f"{name}: its bytes are not those that were indexed (sha256)", ""
    return "", version


def _write_versions(path: Path, versions: list[str]) -> None:
    about = json.loads(path.read_text())
    for entry, version in zip(about["shards"], versions, strict=True):
        entry["version"] = version
    draft = path.with_name(f".{path.name}")
    draft.write_text(json.dumps(about, indent=1))
    os.replace(draft, path)
