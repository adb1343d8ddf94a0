"""Data sets that are rendered here: written once as WebDataset shards, and read back like anybody's."""

from __future__ import annotations

import fcntl
import io
import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from PIL import Image

from sdtrain.data.shard_writer import write_shards
from sdtrain.errors import ConfigError

_CHUNK = 500  # pictures rendered at once


class Shown(Protocol):
    """What a picture shows."""

    def attributes(self) -> dict[str, Any]: ...


Render = Callable[[Sequence[Any]], np.ndarray]  # what pictures show -> uint8 (N, H, W, 3)
Splits = Mapping[str, Iterable[tuple[Shown, str]]]  # what every picture shows, and its caption


def write_once(folder: Path, splits: Splits, render: Render) -> None:
    """Renders and writes the shards where they are not there yet; of several processes one does, and the others wait.

    COMPLETE is written last, so a cut-off attempt starts over.
    """
    if (folder / "COMPLETE").exists():
        return
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with (folder / "lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)  # let go by the kernel when its holder dies
            if not (folder / "COMPLETE").exists():
                for split, pictures in splits.items():
                    write_shards(_samples(split, iter(pictures), render), folder / f"{split}-%05d.tar", 1000)
                (folder / "COMPLETE").touch()
    except OSError as error:
        raise ConfigError(
            f"data.root: cannot write the pictures to {folder}: {error.strerror}; set data.root=DIR"
        ) from error


def _samples(split: str, pictures: Iterator[tuple[Shown, str]], render: Render) -> Iterator[dict[str, Any]]:
    number = 0
    while chunk := list(islice(pictures, _CHUNK)):
        for pixels, (shown, told) in zip(render([shown for shown, _ in chunk]), chunk):
            buffer = io.BytesIO()
            Image.fromarray(pixels).save(buffer, "PNG", compress_level=1)
            yield {
                "__key__": f"{split}_{number:06d}",
                "png": buffer.getvalue(),
                "txt": told.encode(),
                "json": json.dumps(shown.attributes()).encode(),
            }
            number += 1
