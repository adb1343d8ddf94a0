"""Text embeddings beside the latents of a cache: what a frozen text encoder makes of every caption, in float16.

The cache's folder `text` has a folder for each encoder, named by what its states depend on. There are `text.json`,
which says it; `table.npy`, a row a sample, in the order of the latents' table; and a file a part, with a sample's
hidden states, of its own tokens only where padding is masked, then its pooled output.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
from zlib_ng.zlib_ng import crc32

from sdtrain.data.caption import CaptionRule
from sdtrain.data.latent_file import (
    TABLE,
    intact,
    part_paths,
    require_same,
    write_part,
)
from sdtrain.data.sealed import read_sealed, save_array, write_sealed
from sdtrain.errors import ConfigError

FOLDER, ABOUT = "text", "text.json"
ROW = np.dtype(
    [
        ("part", "<i4"),
        ("offset", "<i8"),
        ("num_tokens", "<i4"),
        ("crc", "<u4", 2),  # of the states with the pooled output, and of the row before this
    ]
)
_AT_ONCE = 64  # captions

# captions -> of each its hidden states (T, D) and, where the encoder has one, its pooled output (P,)
Encode = Callable[[list[str]], Sequence[tuple[np.ndarray, np.ndarray | None]]]


def encoder_folder(folder: Path, encoder: Mapping[str, Any]) -> Path:
    """Where a cache has one encoder's embeddings."""
    return folder / FOLDER / hashlib.sha256(json.dumps(encoder, sort_keys=True).encode()).hexdigest()[:16]


def write_text_part(folder: Path, here: Path, about: Mapping[str, Any], part: int, encode: Encode) -> None:
    """The embeddings of one part of a finished cache, unless they are there."""
    table = np.load(folder / TABLE, mmap_mode="r", allow_pickle=False)
    rows = table[table["part"] == part]
    write_part(here, part, _encoded(folder, about, part, rows, encode), ROW, Counter())


def _encoded(
    folder: Path, about: Mapping[str, Any], part: int, rows: np.ndarray, encode: Encode
) -> Iterator[tuple[np.ndarray, bytes]]:
    data, rule = np.memmap(part_paths(folder, part)[0], np.uint8, "r") if len(rows) else None, CaptionRule()
    latents = rows["size"].prod(axis=1) * 4 * about["first_stage"]["latent_channels"] * (1 + about["has_flips"])
    starts, lengths = (rows["offset"] + latents).tolist(), rows["caption_bytes"].clip(min=0).tolist()
    for first in range(0, len(rows), _AT_ONCE):
        spans = zip(starts[first : first + _AT_ONCE], lengths[first : first + _AT_ONCE])
        captions = [rule(data[start : start + length].tobytes(), None, 0.0) for start, length in spans]
        for states, pooled in encode(captions):
            if not np.isfinite(states).all():
                raise ConfigError("--text: a hidden state is not finite in float16; this encoder cannot be stored")
            row = np.zeros(1, ROW)
            stored = states.tobytes() + (b"" if pooled is None else pooled.tobytes())
            row["num_tokens"], row["crc"][0, 0] = len(states), crc32(stored)
            yield row, stored


def finish_text(here: Path, about: Mapping[str, Any], job: Mapping[str, Any]) -> dict[str, Any]:
    """Puts the parts together, once all are there; returns the content of text.json."""
    told, tables = [], []
    for part in range(len(about["parts"])):
        _, rows, said = part_paths(here, part)
        told.append(read_sealed(said))
        tables.append(np.load(rows, allow_pickle=False))
    save_array(here / TABLE, np.concatenate(tables))
    names = ("num_samples", "num_bytes", "sha256")
    parts = [{name: one[name] for name in names} for one in told]
    found = {
        **job,
        "tool": f"sdtrain {version('sdtrain')}",
        "num_samples": about["num_samples"],
        "parts": parts,
    }
    write_sealed(here / ABOUT, found)
    return found


def text_job(about: Mapping[str, Any], encoder: Mapping[str, Any]) -> dict[str, Any]:
    """What the embeddings are of, and by what they are made."""
    return {"encoder": dict(encoder), "latents": about["fingerprint"]}


def read_text_about(folder: Path, about: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """The text.json of every encoder whose embeddings a cache has, by its folder's name."""
    found = {}
    for path in sorted((folder / FOLDER).glob(f"*/{ABOUT}")):
        told = read_sealed(path)
        require_same(told, {"latents": about["fingerprint"]}, f"data.folder: {path.parent} is of other latents")
        found[path.parent.name] = told
    return found


class StoredText:
    """Embeddings by the latents' row.

    Args:
        here: the encoder's folder.
        about: its text.json.
        open_part: a part's bytes, by its number.
    """

    def __init__(self, here: Path, about: Mapping[str, Any], open_part: Callable[[int], Any]) -> None:
        self.encoder, self._part = about["encoder"], open_part
        self._token_bytes, self._pooled_bytes = (2 * (self.encoder[name] or 0) for name in ("width", "pooled_width"))
        self._table = np.load(here / TABLE, mmap_mode="r", allow_pickle=False).view(np.ndarray)
        if self._table.dtype != ROW or len(self._table) != about["num_samples"]:
            raise ConfigError(f"data.folder: {here} does not fit its text.json; make it again with --text")

    def intact(self, rows: np.ndarray) -> list[bool]:
        """Of so many samples whether what is stored is what was written."""
        found = self._table[rows]
        fields = (found[name].tolist() for name in ("part", "offset", "num_tokens", "crc"))
        return [
            whole
            and crc32(memoryview(self._part(part))[at : at + num * self._token_bytes + self._pooled_bytes]) == crc[0]
            for whole, part, at, num, crc in zip(intact(found), *fields)
        ]

    def read(self, rows: np.ndarray) -> dict[str, np.ndarray]:
        """Of so many samples the states (B, L, D) float16, padded with zeros, which tokens are there, and pooled."""
        found = self._table[rows]
        length, width, pooled_width = self.encoder["max_tokens"], self._token_bytes // 2, self._pooled_bytes // 2
        states = np.zeros((len(rows), length, width), np.float16)
        pooled = np.zeros((len(rows), pooled_width), np.float16)
        fields = (found[name].tolist() for name in ("part", "offset", "num_tokens"))
        for number, (part, offset, num_tokens) in enumerate(zip(*fields)):
            data = np.frombuffer(self._part(part), np.float16, num_tokens * width + pooled.shape[1], offset)
            states[number, :num_tokens] = data[: num_tokens * width].reshape(num_tokens, width)  # (T, D)
            pooled[number] = data[num_tokens * width :]
        mask = np.arange(length) < found["num_tokens"][:, None]  # (B, L)
        told = {"text_states": states, "text_mask": mask}
        return told | ({"text_pooled": pooled} if pooled_width else {})
