"""Checkpoints that commit: a directory holds everything, hashed, or it is not a checkpoint.

A save writes into `step_N.tmp/`, forces it to the disk, adds COMPLETE.json (bytes and sha256 of every file) and
renames. Whenever a machine dies, `newest_valid` finds the newest save that is whole, and says why it skipped others.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from sdtrain.errors import ConfigError, RunError

MANIFEST = "COMPLETE.json"


def commit(directory: Path, write: Callable[[Path], None], meta: Mapping[str, Any], needed_bytes: int) -> Path:
    """Lets `write` fill a new checkpoint and puts it at `directory`, all or nothing; about `needed_bytes` large."""
    temporary = directory.with_name(f"{directory.name}.tmp")
    try:
        if temporary.exists():  # left by a save that was killed
            shutil.rmtree(temporary)
        temporary.mkdir(parents=True)
        write(temporary)
        _write_manifest(temporary, meta)
        if directory.exists():  # of this step, but corrupt or of an abandoned line: a resume did not take it
            shutil.rmtree(directory)
        os.rename(temporary, directory)
        _sync(directory.parent)
    except BaseException as error:
        shutil.rmtree(temporary, ignore_errors=True)
        free_bytes = _free_bytes(directory)
        # Asked of the disk, since torch.save reports a full one as a RuntimeError about positions.
        is_full = free_bytes < needed_bytes and isinstance(error, Exception)
        if not is_full and not isinstance(error, OSError | SafetensorError):
            raise
        raise ConfigError(
            f"cannot save the checkpoint {directory}: {'the disk is full' if is_full else error} "
            f"({needed_bytes} bytes needed, {free_bytes} bytes free); earlier checkpoints are intact: "
            "make room or make the directory writable, then run the same command again"
        ) from error
    return directory


def verify(path: Path) -> None:
    """Raises RunError, naming the file and the reason, unless every file is what was committed."""
    for name, expected in read_manifest(path)["files"].items():
        file = path / name
        try:
            num_bytes = file.stat().st_size
            if num_bytes != expected["bytes"]:
                raise RunError(f"{file} has {num_bytes} bytes, {expected['bytes']} were written", 3)
            if _sha256(file) != expected["sha256"]:
                raise RunError(f"{file} is not what was written: its sha256 differs", 3)
        except OSError as error:
            raise RunError(f"{file} cannot be read: {error.strerror}", 3) from error


def read_manifest(path: Path) -> dict[str, Any]:
    """COMPLETE.json of a checkpoint: `files`, `step`, `images`, `world_size`, `config_hash`, `parent`, ..."""
    file = path / MANIFEST
    try:
        content = json.loads(file.read_bytes())
    except (OSError, ValueError) as error:
        raise RunError(f"{file} cannot be read: {error}", 3) from error
    if not isinstance(content, dict) or content.pop("digest", None) != _digest(content):
        raise RunError(f"{file} was altered after it was written", 3)
    return content


def manifest_hash(path: Path) -> str:
    """What names this checkpoint, with all its files, to those that continue from it."""
    return _sha256(path / MANIFEST)


def newest_valid(checkpoints_directory: Path) -> tuple[Path | None, list[tuple[Path, str]]]:
    """The newest checkpoint that is whole, and those newer than it with the reason each was skipped for."""
    skipped = []
    for path in sorted(_committed(checkpoints_directory), key=lambda path: int(path.name[5:]), reverse=True):
        try:
            verify(path)
        except RunError as error:
            skipped.append((path, str(error)))
        else:
            return path, skipped
    return None, skipped


def find_resume(checkpoints_directory: Path, resume: str) -> Path | None:
    """Where to continue from: `auto` takes the newest valid checkpoint if any, `must` insists, `never` starts anew."""
    if resume not in ("auto", "must", "never"):
        raise ConfigError(f"resume={resume}: it is auto, must or never")
    if resume == "never":
        return None
    path, skipped = newest_valid(checkpoints_directory)
    for skipped_path, reason in skipped:
        print(f"skipped checkpoint {skipped_path.name}: {reason}", flush=True)
    if path is None and resume == "must":
        raise RunError(
            f"resume=must, but no checkpoint in {checkpoints_directory} is valid ({len(skipped)} skipped)", 3
        )
    if path is None and skipped:
        print("no valid checkpoint is left: starting from the beginning", flush=True)
    return path


def prune(newest: Path, keep_last: int) -> None:
    """Deletes all checkpoints but the last `keep_last` of the line that ends in `newest`, and what killed saves left.

    The line is followed by parent hashes, not by step numbers: a corrupt checkpoint that a resume went round is not
    of it, so it never takes the place of one that is whole, whatever its number.
    """
    by_hash = {manifest_hash(path): path for path in _committed(newest.parent) if (path / MANIFEST).is_file()}
    keep: list[Path] = []
    path: Path | None = newest
    while path is not None and len(keep) < keep_last:
        keep.append(path)
        path = by_hash.get(read_manifest(path).get("parent"))
    for path in newest.parent.glob("step_*"):
        if path not in keep:
            shutil.rmtree(path)


def _write_manifest(directory: Path, meta: Mapping[str, Any]) -> None:
    files = sorted(path for path in directory.rglob("*") if path.is_file())
    for file in files:
        _sync(file)
    listed = {
        str(file.relative_to(directory)): {"bytes": file.stat().st_size, "sha256": _sha256(file)} for file in files
    }
    content = {**meta, "files": listed}
    content["digest"] = _digest(content)
    (directory / MANIFEST).write_text(json.dumps(content, indent=1, sort_keys=True))
    _sync(directory / MANIFEST)
    for path in (directory, *directory.rglob("*")):
        if path.is_dir():
            _sync(path)


def _committed(directory: Path) -> list[Path]:
    return [path for path in directory.glob("step_*") if re.fullmatch(r"step_\d+", path.name)]


def _digest(content: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def _sha256(file: Path) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _free_bytes(path: Path) -> int:
    while not path.exists():
        path = path.parent
    return shutil.disk_usage(path).free
