"""The embedded data set: coloured shapes with captions, written as WebDataset shards and read back like anybody's."""

from __future__ import annotations

from pathlib import Path

from sdtrain.data.datamodule import ShardDataModule
from sdtrain.data.rendered import write_once
from sdtrain.data.scene import SIZE, render, scenes


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
        self._splits = {  # kind, seed, count
            "train": ("mixed", 2 * shapes_seed, num_train),
            "val": ("mixed", 2 * shapes_seed + 1, num_val),
            "held_out": ("held_out", 2 * shapes_seed, num_held_out),
        }
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
        """Renders and writes the shards where they are not there yet."""
        write_once(self.folder, {split: scenes(*which) for split, which in self._splits.items()}, render)
