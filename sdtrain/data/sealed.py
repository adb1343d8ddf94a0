"""Small files of a latent cache, which are there whole or not at all: written beside, synced, renamed; a .json has a
version and a checksum of itself.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from zlib_ng.zlib_ng import crc32

from sdtrain.errors import ConfigError

VERSION = 3  # of a cache's files; 1 had no checksum a sample, 2 none of a .json


def write_sealed(path: Path, values: Mapping[str, Any]) -> None:
    """As JSON, with the version and the checksum that `read_sealed` looks at."""
    with draft(path).open("wb") as file:
        values = {"v": VERSION, **values}
        file.write(json.dumps({**values, "crc": _crc(values)}, indent=1).encode())
        commit(file, path)


def read_sealed(path: Path) -> dict[str, Any]:
    """What was written. OSError where there is no file.

    Raises:
        ConfigError: where it is not what was written, or by another version.
    """
    try:
        values = json.loads(path.read_bytes())
        crc = values.pop("crc", None)
    except (ValueError, AttributeError, TypeError, RecursionError) as error:
        raise ConfigError(f"{path} is no JSON that this package wrote ({error}); make it again") from error
    if values.get("v", 1) != VERSION:
        raise ConfigError(
            f"{path.parent} is a cache of version {values.get('v', 1)}, this reads {VERSION}, whose files have "
            "checksums; remove it and make it again with tools/precompute_latents.py"
        )
    if crc != _crc(values):
        raise ConfigError(f"{path} is not what was written; it is damaged: make it again")
    return values


def save_array(path: Path, array: np.ndarray) -> None:
    """A .npy file."""
    with draft(path).open("wb") as file:
        np.save(file, array)
        commit(file, path)


def draft(path: Path) -> Path:
    """Where a file is written, beside its place."""
    return path.with_name(f".{path.name}")


def commit(file: Any, path: Path) -> None:  # noqa: ANN401 an open file, of a draft
    """Puts it into its place."""
    file.flush()
    os.fsync(file.fileno())
    os.replace(file.name, path)


def _crc(values: Mapping[str, Any]) -> int:
    return crc32(json.dumps(values).encode())
