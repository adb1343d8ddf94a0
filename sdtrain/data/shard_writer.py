"""Samples -> tar shards, through webdataset's writer, byte-identical each time."""

from __future__ import annotations

import itertools
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, BinaryIO


def write_shards(
    samples: Iterable[Mapping[str, Any]], pattern: str | Path, samples_per_shard: int = 1000
) -> list[Path]:
    """Write samples {"__key__": str, "png": bytes, "txt": bytes, ...} to shards named by `pattern`, as in "x-%06d.tar".

    The shards take their names when all are written: a run that is killed leaves `.tmp` files, never half a set.
    """
    os.environ["WDS_SECURE"] = "1"  # read at import: no pipes, no pickles
    from webdataset import ShardWriter

    samples = iter(samples)
    first = next(samples, None)
    if first is None:
        return []
    Path(pattern).parent.mkdir(parents=True, exist_ok=True)
    files: list[BinaryIO] = []

    def open_shard(name: str) -> BinaryIO:
        files.append(open(name, "wb"))  # noqa: SIM115  the writer closes it through `post`
        return files[-1]

    def close_shard(_name: str) -> None:
        files[-1].close()

    # mtime=0: the clock would make the bytes differ and add a header to every member
    writer = ShardWriter(
        f"{pattern}.tmp",
        maxcount=samples_per_shard,
        verbose=0,
        opener=open_shard,
        post=close_shard,
        encoder=False,
        mtime=0,
    )
    for sample in itertools.chain([first], samples):
        writer.write(sample)
    writer.close()
    shards = [Path(file.name.removesuffix(".tmp")) for file in files]
    for shard in shards:
        os.replace(f"{shard}.tmp", shard)
    return shards
