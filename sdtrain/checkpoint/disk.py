"""A disk that is full, or cannot be written any more: one line, whatever met it first."""

from __future__ import annotations

import errno
import os
import re
import shutil
from pathlib import Path

from safetensors import SafetensorError

from sdtrain.errors import ConfigError

_FULL_OR_FIXED = (errno.ENOSPC, errno.EDQUOT, errno.EROFS)
_FORBIDDEN = (errno.EACCES, errno.EPERM)  # of a run's own file: another user's; elsewhere it may be read that is not
ADVICE = "make room or make the directory writable, then run the same command again"


def free_bytes(path: Path) -> int:
    """On the disk where `path` is, or will be."""
    while not path.exists():
        path = path.parent
    return shutil.disk_usage(path).free


def told_of_disk(failure: BaseException, directory: Path) -> BaseException:
    """A failure as it is, but a ConfigError where something of the run in `directory` could not be written."""
    number, name = _number(failure), getattr(failure, "filename", None)
    file = directory if name is None else Path(os.fsdecode(name))
    is_own = name is not None and directory in (file, *file.parents)
    if number not in _FULL_OR_FIXED and not (is_own and number in _FORBIDDEN):
        return failure
    told = ConfigError(
        f"cannot write {f'in {file}' if name is None else file}: {os.strerror(number)} "
        f"({free_bytes(file)} bytes free); the checkpoints are intact: {ADVICE}"
    )
    told.__cause__ = failure
    return told


def _number(failure: BaseException) -> int | None:
    if isinstance(failure, SafetensorError):  # which has it as text alone
        found = re.search(r"os error (\d+)", str(failure))
        return int(found[1]) if found else None
    return failure.errno if isinstance(failure, OSError) else None
