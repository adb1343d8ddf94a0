"""The embedded data set: coloured shapes with captions, written as WebDataset shards and read back like anybody's."""

from __future__ import annotations

import fcntl
import io
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from PIL import Image

from sdtrain.data.datamodule import ShardDataModule
from sdtrain.data.scene import SIZE, Scene, render, scenes
from sdtrain.data.shard_writer import write_shards
from sdtrain.errors import ConfigError


def write(directory: Path, seed: int, num_train: int, num_val: int, num_held_out: int) -> None:
    """Writes the three splits as WebDataset shards; COMPLETE is written last, so a cut-off attempt starts over."""
    for split, kind, count in (
        ("train", "mixed", num_train),
        ("val", "mixed", num_val),
        ("held_out", "held_out", num_held_out),
    ):
        split_seed = {"train": 2 * seed, "val": 2 * seed + 1, "held_out": 2 * seed}[split]
        write_shards(_samples(split, kind, split_seed, count), directory / f"{split}-%05d.tar", 1000)
    (directory / "COMPLETE").touch()


def _samples(split: str, kind: str, seed: int, count: int) -> Iterator[dict[str, Any]]:
    chunk: list[tuple[Scene, str]] = []
    number = 0
    for scene, text in scenes(kind, seed, count):
        chunk.append((scene, text))
        if len(chunk) < 500 and number + len(chunk) < count:
            continue
        for picture, (shown, told) in zip(render([shown for shown, _ in chunk]), chunk):
            buffer = io.BytesIO()
            Image.fromarray(picture).save(buffer, "PNG", compress_level=1)
            attributes = json.dumps(shown.attributes()).encode()
            yield {
                "__key__": f"{split}_{number:06d}",
                "png": buffer.getvalue(),
                "txt": told.encode(),
                "json": attributes,
            }
            number += 1
        chunk = []


class ShapesDataModule(ShardDataModule):
    """The embedded data set, written once under `root` and read back as shards like any other.

    Args:
        root: where data sets lie; this one goes into a folder named by its seed and sizes.
        shapes_seed: of the pictures, not of the run.
        num_held_out: pictures of the (colour, shape) pairs that training never shows.
        num_workers, cache_bytes, max_samples: as for any shards.
    """

    def __init__(
        self,
        root: str,
        shapes_seed: int = 0,
        num_train: int = 20_000,
        num_val: int = 1_000,
        num_held_out: int = 512,
        num_workers: int = 0,
        cache_bytes: int = 1 << 30,
        max_samples: int | None = None,
    ) -> None:
        self.folder = Path(root).expanduser() / f"shapes-v1-{shapes_seed}-{num_train}-{num_val}-{num_held_out}"
        self._numbers = (shapes_seed, num_train, num_val, num_held_out)
        super().__init__(
            str(self.folder / "train-*.tar"),
            image_size=SIZE,
            num_workers=num_workers,
            cache_bytes=cache_bytes,
            max_samples=max_samples,
        )
        for split in ("val", "held_out"):
            self._shards[split] = str(self.folder / f"{split}-*.tar")

    def prepare_data(self) -> None:
        """Renders and writes the shards where they are not there yet; of several processes one does, and the others
        wait.
        """
        if (self.folder / "COMPLETE").exists():
            return
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            with (self.folder / "lock").open("w") as lock:
                fcntl.flock(lock, fcntl.LOCK_EX)  # let go by the kernel when its holder dies
                if not (self.folder / "COMPLETE").exists():
                    write(self.folder, *self._numbers)
        except OSError as error:
            raise ConfigError(
                f"data.root: cannot write the shapes to {self.folder}: {error.strerror}; set data.root=DIR"
            ) from error
