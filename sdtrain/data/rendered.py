"""The embedded data sets: rendered here, written once as WebDataset shards, and read back like anybody's."""

from __future__ import annotations

import fcntl
import io
import json
from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from PIL import Image

from sdtrain.data.datamodule import ShardDataModule
from sdtrain.data.shard_writer import write_shards
from sdtrain.errors import ConfigError

_CHUNK = 500  # pictures rendered at once


class Shown(Protocol):
    """What a picture shows."""

    def attributes(self) -> dict[str, Any]: ...


class Pictures(Protocol):
    """What is drawn: `scene.Shapes`, `lettering.Words`."""

    name: str  # another wherever they are drawn otherwise
    size: int  # the side in pixels

    @staticmethod
    def draw(kind: str, seed: int, count: int) -> Iterator[tuple[Shown, str]]: ...  # with captions

    @staticmethod
    def render(shown: Sequence[Any]) -> np.ndarray: ...  # uint8 (N, H, W, 3)


class RenderedDataModule(ShardDataModule):
    """An embedded data set, written once under `root` and read back as shards like any other.

    Args:
        root: where data sets lie; this one goes into a folder named by its pictures, its seed and sizes.
        pictures: what is drawn.
        pictures_seed: of the pictures, not of the run.
        num_val: more pictures of the training kind.
        num_held_out: pictures of what training never shows: pairs of colour and shape, or words.
        num_workers, cache_bytes, max_samples: as for any shards.
    """

    def __init__(
        self,
        root: str,
        pictures: Pictures,
        pictures_seed: int = 0,
        num_train: int = 20_000,
        num_val: int = 1_000,
        num_held_out: int = 512,
        num_workers: int = 0,
        cache_bytes: int = 1 << 30,
        max_samples: int | None = None,
    ) -> None:
        if num_train < 1 or num_val < 0 or num_held_out < 0:
            counts = f"num_train={num_train} num_val={num_val} num_held_out={num_held_out}"
            raise ConfigError(f"data: {counts}: there must be a picture to train on, and no count is below 0")
        name = f"{pictures.name}-{pictures_seed}-{num_train}-{num_val}-{num_held_out}"
        self.folder, self._pictures = Path(root).expanduser() / name, pictures
        self._splits = {  # kind, seed, count
            "train": ("mixed", 2 * pictures_seed, num_train),
            "val": ("mixed", 2 * pictures_seed + 1, num_val),
            "held_out": ("held_out", 2 * pictures_seed, num_held_out),
        }
        super().__init__(
            str(self.folder / "train-*.tar"),
            image_size=pictures.size,
            num_workers=num_workers,
            cache_bytes=cache_bytes,
            max_samples=max_samples,
        )
        for split in ("val", "held_out"):
            self._shards[split] = str(self.folder / f"{split}-*.tar")

    def prepare_data(self) -> None:
        """Renders and writes the shards where they are not there yet; of several processes one does, and the others
        wait.

        COMPLETE is written last, so a cut-off attempt starts over.
        """
        folder = self.folder
        if (folder / "COMPLETE").exists():
            return
        try:
            folder.mkdir(parents=True, exist_ok=True)
            with (folder / "lock").open("w") as lock:
                fcntl.flock(lock, fcntl.LOCK_EX)  # let go by the kernel when its holder dies
                if not (folder / "COMPLETE").exists():
                    for split in self._splits:
                        write_shards(self._samples(split), folder / f"{split}-%05d.tar", 1000)
                    (folder / "COMPLETE").touch()
        except OSError as error:
            raise ConfigError(
                f"data.root: cannot write the pictures to {folder}: {error.strerror}; set data.root=DIR"
            ) from error

    def _samples(self, split: str) -> Iterator[dict[str, Any]]:
        number, drawn = 0, self._pictures.draw(*self._splits[split])
        while chunk := list(islice(drawn, _CHUNK)):
            for pixels, (shown, told) in zip(self._pictures.render([shown for shown, _ in chunk]), chunk):
                buffer = io.BytesIO()
                Image.fromarray(pixels).save(buffer, "PNG", compress_level=1)
                yield {
                    "__key__": f"{split}_{number:06d}",
                    "png": buffer.getvalue(),
                    "txt": told.encode(),
                    "json": json.dumps(shown.attributes()).encode(),
                }
                number += 1
