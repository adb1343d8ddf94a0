"""Lightning's checkpoints through the commit protocol."""

from __future__ import annotations

import shutil
from functools import partial
from pathlib import Path
from typing import Any

from lightning.pytorch.plugins.io import CheckpointIO
from typing_extensions import override

from sdtrain.checkpoint import commit, files


class CommitIO(CheckpointIO):
    """Saves all or nothing and loads only what is verified; `checkpoint["sdtrain"]` goes into COMPLETE.json."""

    def __init__(self) -> None:
        self._parent = ""  # manifest hash of the checkpoint this process continues from

    @override
    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any = None) -> None:
        meta = {"step": checkpoint["global_step"], **checkpoint.get("sdtrain", {}), "parent": self._parent}
        path = commit.commit(Path(path), partial(files.write, checkpoint), meta, files.count_bytes(checkpoint))
        self._parent = commit.manifest_hash(path)

    @override
    def load_checkpoint(
        self, path: str | Path, map_location: Any = None, weights_only: bool | None = None
    ) -> dict[str, Any]:
        commit.verify(Path(path))
        self._parent = commit.manifest_hash(Path(path))
        return files.read(Path(path), map_location or "cpu")

    @override
    def remove_checkpoint(self, path: str | Path) -> None:
        shutil.rmtree(path)
