"""Turn a folder of pictures with captions into shards to train on.

    python tools/make_shards.py FOLDER OUT

Captions stand in x.txt beside x.png, or in one captions.jsonl or captions.csv with the columns file_name (or file) and
caption (or text). Pictures are copied as they are; what cannot be trained on is left out, and OUT/left_out.tsv names it
with its reason.
Beside x.png may stand x.mask.png, white where to paint, and x.source.png, the picture to edit.
"""

from __future__ import annotations

import argparse
import csv
import io
import json
import os
import re
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from sdtrain.data.bad_sample import BadSample
from sdtrain.data.caption import clean_caption
from sdtrain.data.decode import decode_image
from sdtrain.data.index import build_index
from sdtrain.data.layout import COMPANIONS, IMAGE_SUFFIXES
from sdtrain.data.shard_writer import write_shards
from sdtrain.errors import ConfigError

IMAGES = {".jpg", ".jpeg", ".png", ".webp"}
OTHER_IMAGES = {".gif", ".bmp", ".tif", ".tiff", ".avif", ".heic"}
CHECK_SIZE = 64


def main(argv: list[str] | None = None) -> int:
    """Write the shards and their index, and say what was left out and what to type next."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", metavar="FOLDER", type=Path, help="pictures with captions; sub-folders are read too")
    parser.add_argument("out", metavar="OUT", type=Path, help="where the shards go; made if absent")
    parser.add_argument("--samples-per-shard", type=int, default=1000, metavar="N", help="default: %(default)s")
    args = parser.parse_args(argv)
    try:
        make_shards(args.folder, args.out, args.samples_per_shard)
    except ConfigError as error:
        print(error, file=sys.stderr)
        return error.exit_code
    return 0


def make_shards(folder: Path, out: Path, samples_per_shard: int) -> list[Path]:
    """FOLDER -> OUT/shard-000000.tar and on. Raises ConfigError where there is nothing to write or no place for it."""
    if samples_per_shard < 1:
        raise ConfigError(f"--samples-per-shard: {samples_per_shard} is not a count of samples")
    if not folder.is_dir():
        raise ConfigError(f"{folder} is not a folder; give a folder of pictures with captions")
    if any(out.glob("*.tar")):
        raise ConfigError(f"{out} already holds shards; give an empty folder, or one that does not exist yet")
    pairs, skipped = find_pairs(folder)
    empty: list[Path] = []
    try:
        pattern = str(out / "shard-").replace("%", "%%") + "%06d.tar"
        shards = write_shards(read_samples(folder, pairs, empty, skipped), pattern, samples_per_shard)
    except OSError as error:
        raise ConfigError(f"{error.filename or out}: {error.strerror or error}; the shards were not written") from error
    left_out = ", ".join(f"{reason} {count}" for reason, count in Counter(skipped.values()).most_common())
    if not shards:
        raise ConfigError(f"{folder}: none of its pictures can be used ({left_out})")
    index = build_index(shards)
    print(f"wrote {len(index)} samples in {len(shards)} shard{'s' * (len(shards) > 1)} to {out}")
    if skipped:
        names = out / "left_out.tsv"
        names.write_bytes(
            b"".join(f"{reason}\t".encode() + os.fsencode(path) + b"\n" for path, reason in skipped.items())
        )
        print(f"left out {len(skipped)}: {left_out}; see {names}")
    if empty:
        print(f"{len(empty)} captions are empty: those pictures are trained without a condition")
    print(f"next: python -m sdtrain +experiment=quickstart data=webdataset data.shards='{out}/*.tar'")
    return shards


def find_pairs(folder: Path) -> tuple[list[tuple[Path, bytes]], dict[Path, str]]:
    """Every picture with its caption, sorted; and why others have none."""
    for name, read in (("captions.jsonl", _read_jsonl), ("captions.csv", _read_csv)):
        if (folder / name).is_file():
            rows = [(folder / file, caption.encode()) for file, caption in read(folder / name)]
            if not rows:
                raise ConfigError(f"{folder / name} has no rows; write one a picture, with file_name and caption")
            return sorted(rows), {}
    pictures = sorted(path for path in folder.rglob("*") if path.suffix.lower() in IMAGES and path.is_file())
    pictures = [path for path in pictures if Path(path.stem).suffix[1:] not in COMPANIONS or _caption(path).is_file()]
    others = sorted(path for path in folder.rglob("*") if path.suffix.lower() in OTHER_IMAGES)
    if not pictures:
        raise ConfigError(f"{folder} has no pictures ({', '.join(sorted(IMAGES))})")
    pairs = [(path, _caption(path)) for path in pictures]
    found = [(path, caption.read_bytes()) for path, caption in pairs if caption.is_file()]
    if not found:
        raise ConfigError(
            f"{folder} has {len(pictures)} pictures and no captions. Put x.txt beside x.png, "
            "or one captions.jsonl or captions.csv with the columns file_name and caption into the folder"
        )
    alone = [path for path, caption in pairs if not caption.is_file()]
    return found, dict.fromkeys(alone, "no_caption") | dict.fromkeys(others, "not_an_image")


def _caption(path: Path) -> Path:
    capitals = path.with_suffix(".TXT")
    return capitals if capitals.is_file() else path.with_suffix(".txt")


def read_samples(
    folder: Path, pairs: list[tuple[Path, bytes]], empty: list[Path], skipped: dict[Path, str]
) -> Iterator[dict[str, Any]]:
    """The samples that can be trained on, the picture's bytes as they are; the others go into `skipped`, with why, and
    those without a word into `empty`, too.
    """
    taken: set[str] = set()
    for path, caption in pairs:
        try:
            if not path.is_file():
                raise BadSample("no_such_file")
            data = path.read_bytes()
            text = clean_caption(caption)
            size = decode_image(data, CHECK_SIZE, CHECK_SIZE).original_size
            if path.suffix.lower() not in IMAGES:
                raise BadSample("not_an_image")
            companions = dict(_read_companions(path, size))
        except BadSample as bad:
            skipped[path] = bad.reason
            continue
        if not text:
            empty.append(path)
        key = _key(path, folder, taken)
        yield {"__key__": key, path.suffix[1:].lower(): data, **companions, "txt": caption}


def _read_companions(path: Path, size: tuple[int, int]) -> Iterator[tuple[str, bytes]]:
    """Members by suffix, such as mask.png; of a picture of this size."""
    for name in COMPANIONS:
        written = (f".{name}.{suffix}" for suffix in (*IMAGE_SUFFIXES, *map(str.upper, IMAGE_SUFFIXES)))
        file = next((file for file in map(path.with_suffix, written) if file.is_file()), None)
        if file is not None:
            data = file.read_bytes()
            if decode_image(data, CHECK_SIZE, CHECK_SIZE).original_size != size:
                raise BadSample("other_size")
            yield f"{name}{file.suffix.lower()}", data


def _key(path: Path, folder: Path, taken: set[str]) -> str:
    """A key that people recognise: the picture's path in letters that every tar and every reader takes."""
    inside = path.relative_to(folder) if path.is_relative_to(folder) else Path(path.name)
    stem = re.sub(r"[^A-Za-z0-9_-]+", "_", str(inside.with_suffix("")))[:80]
    key, number = stem, 1
    while key in taken:
        number += 1
        key = f"{stem}_{number}"
    taken.add(key)
    return key


def _read_jsonl(path: Path) -> Iterator[tuple[str, str]]:
    for number, line in enumerate(_read_text(path).split("\n"), start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise ConfigError(f"{path} line {number} is not JSON: {error}") from error
        yield _row(row if isinstance(row, dict) else {}, path, number)


def _read_csv(path: Path) -> Iterator[tuple[str, str]]:
    reader = csv.DictReader(io.StringIO(_read_text(path), newline=""))
    try:
        for row in reader:
            yield _row(row, path, reader.line_num)
    except csv.Error as error:
        raise ConfigError(f"{path} line {reader.line_num} is not CSV: {error}") from error


def _read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path} is not UTF-8: {error.reason} at byte {error.start}") from error


def _row(row: dict[str, Any], path: Path, number: int) -> tuple[str, str]:
    file, caption = row.get("file_name") or row.get("file"), row.get("caption", row.get("text"))
    if not isinstance(file, str) or not isinstance(caption, str):
        raise ConfigError(f"{path} line {number} needs file_name (or file) and caption (or text), both texts")
    return file, caption


if __name__ == "__main__":
    sys.exit(main())
