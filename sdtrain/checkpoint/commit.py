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
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from sdtrain.checkpoint.disk import ADVICE, free_bytes
from sdtrain.errors import ConfigError, RunError

MANIFEST = "COMPLETE.json"
_found: dict[Path, str] = {}  # by the first rank's `find_resume`, with the hash of its manifest


def commit(
    directory: Path,
    write: Callable[[Path], Iterable[Path]],
    meta: Mapping[str, Any],
    needed_bytes: int,
    rank: int = 0,
    exchange: Callable[[Any], list[Any]] = lambda own: [own],
) -> Path:
    """Puts a new checkpoint at `directory`, all or nothing.

    Args:
        write: fills the directory that it is given and returns its files.
        meta: what COMPLETE.json says beside the files.
        needed_bytes: about what `write` needs.
        rank: of several that write together; the first one commits.
        exchange: what each of them gives, to all of them.

    Raises:
        ConfigError: where a file cannot be written, on any rank.
    """
    temporary = directory.with_name(f"{directory.name}.tmp")

    def together(action: Callable[[], Any]) -> list[Any]:
        """Runs it here; no rank goes on before all have done it, and none where one could not."""
        own, told, error = None, "", None
        try:
            own = action()
        except Exception as raised:
            told, error = _explain(raised, directory, needed_bytes), raised
        except BaseException:
            shutil.rmtree(temporary, ignore_errors=True)
            raise
        all_told = exchange((own, told))
        failed = next((told for _, told in all_told if told), "")
        if failed and rank == 0:
            shutil.rmtree(temporary, ignore_errors=True)
        if failed:
            raise error if error is not None and failed == repr(error) else ConfigError(failed) from error
        return [own for own, _ in all_told]

    def prepare() -> None:
        if temporary.exists():  # left by a save that was killed
            shutil.rmtree(temporary)
        temporary.mkdir(parents=True)

    def finish() -> None:
        _write_manifest(temporary, {**meta, "files": {name: file for part in written for name, file in part.items()}})
        if directory.exists():  # of this step, but corrupt or of an abandoned line: a resume did not take it
            shutil.rmtree(directory)
        os.rename(temporary, directory)
        _sync(directory.parent)

    together(prepare if rank == 0 else lambda: None)
    written = together(lambda: _describe(temporary, write(temporary)))
    together(finish if rank == 0 else lambda: None)
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


def verify_once(path: Path) -> None:
    """As `verify`, but for the checkpoint that `find_resume` has just verified: a resume reads it all one time less."""
    read_manifest(path)  # which says so where another rank found what is not here
    if _found.pop(path, None) != manifest_hash(path):
        verify(path)


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


def find_resume(
    checkpoints_directory: Path,
    resume: str,
    rank: int = 0,
    broadcast: Callable[[Any], Any] = lambda own: own,
) -> Path | None:
    """Where to continue from: `auto` takes the newest valid checkpoint if any, `must` insists, `never` starts anew.

    The first rank reads and verifies; the others wait for its word, and load nothing but what it has verified.

    Args:
        broadcast: gives every rank what the first one says.
    """
    if resume not in ("auto", "must", "never"):
        raise ConfigError(f"resume={resume}: it is auto, must or never")
    if resume == "never":
        return None
    own = _find(checkpoints_directory) if rank == 0 else (None, "", 0)
    path, digest, num_skipped = broadcast(own)
    if path is None and resume == "must":
        raise RunError(f"resume=must, but no checkpoint in {checkpoints_directory} is valid ({num_skipped} skipped)", 3)
    if path is not None:
        _found[path] = digest
    elif num_skipped and rank == 0:
        print("no valid checkpoint is left: starting from the beginning", flush=True)
    return path


def _find(checkpoints_directory: Path) -> tuple[Path | None, str, int]:
    """The newest valid checkpoint, what names it, and how many newer ones are not."""
    path, skipped = newest_valid(checkpoints_directory)
    for skipped_path, reason in skipped:
        print(f"skipped checkpoint {skipped_path.name}: {reason}", flush=True)
    return path, "" if path is None else manifest_hash(path), len(skipped)


def prune(newest: Path, keep_last: int, keep_every_steps: int | None = None, best: str = "max") -> list[str]:
    """Deletes all checkpoints but those to stay of the line that ends in `newest`, and what killed saves left.

    The line is what each manifest names as its `line`, not step numbers: a corrupt checkpoint that a resume went round
    is not of it, so it never takes the place of one that is whole, whatever its number.

    Args:
        keep_last: so many newest ones.
        keep_every_steps: those of steps that this divides.
        best: "min" or "max" of the manifests' `score`, where they have one: that one.

    Returns what names those that stay, oldest first.
    """
    manifest = read_manifest(newest)
    names = {*manifest.get("line", []), manifest_hash(newest)}
    whole = [path for path in _committed(newest.parent) if (path / MANIFEST).is_file()]
    found = {path: read_manifest(path) for path in whole if manifest_hash(path) in names}
    line = sorted(found, key=lambda path: found[path]["step"])
    keep = line[-keep_last:]
    if keep_every_steps is not None:
        keep += [path for path in line if found[path]["step"] % keep_every_steps == 0]
    scored = [path for path in line if found[path].get("score") is not None]
    if scored:
        keep.append((min if best == "min" else max)(scored, key=lambda path: found[path]["score"]))
    for path in newest.parent.glob("step_*"):
        if path not in keep:
            shutil.rmtree(path)
    return [manifest_hash(path) for path in line if path in keep]


def _describe(directory: Path, files: Iterable[Path]) -> dict[str, dict[str, Any]]:
    """Size and hash of files that are on the disk, not in a cache of it."""
    described = {}
    for file in files:
        _sync(file)
        described[str(file.relative_to(directory))] = {"bytes": file.stat().st_size, "sha256": _sha256(file)}
    return described


def _write_manifest(directory: Path, content: dict[str, Any]) -> None:
    content["digest"] = _digest(content)
    (directory / MANIFEST).write_text(json.dumps(content, indent=1, sort_keys=True))
    _sync(directory / MANIFEST)
    for path in (directory, *directory.rglob("*")):
        if path.is_dir():
            _sync(path)


def _explain(error: Exception, directory: Path, needed_bytes: int) -> str:
    """A line for whoever cannot save; a mistake of the program's as it is."""
    num_free = free_bytes(directory)
    # Asked of the disk, since torch.save reports a full one as a RuntimeError about positions.
    is_full = num_free < needed_bytes
    if not is_full and not isinstance(error, OSError | SafetensorError):
        return repr(error)
    return (
        f"cannot save the checkpoint {directory}: {'the disk is full' if is_full else error} "
        f"({needed_bytes} bytes needed, {num_free} bytes free); earlier checkpoints are intact: {ADVICE}"
    )


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
