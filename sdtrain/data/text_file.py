"""Text embeddings beside the latents of a cache: what a frozen text encoder makes of every caption, in float16.

A folder `text` inside of the cache's has `text.json`, which says by which encoder they were made; `table.npy`, a row a
sample, in the order of the latents' table; and a file a part, with a sample's hidden states, of its own tokens only
where padding is masked, then its pooled output.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

from sdtrain.data.caption import CaptionRule
from sdtrain.data.latent_file import TABLE, part_paths, require_same, save_array, write_json, write_part
from sdtrain.errors import ConfigError

FOLDER, ABOUT = "text", "text.json"
ROW = np.dtype([("part", "<i4"), ("offset", "<i8"), ("num_tokens", "<i4")])
_AT_ONCE = 64  # captions

# captions -> of each its hidden states (T, D) and, where the encoder has one, its pooled output (P,)
Encode = Callable[[list[str]], Sequence[tuple[np.ndarray, np.ndarray | None]]]


def write_text_part(folder: Path, about: Mapping[str, Any], part: int, encode: Encode) -> None:
    """The embeddings of one part of a finished cache, unless they are there."""
    table = np.load(folder / TABLE, mmap_mode="r", allow_pickle=False)
    rows = table[table["part"] == part]
    write_part(folder / FOLDER, part, _encoded(folder, about, part, rows, encode), ROW, Counter())


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
            row["num_tokens"] = len(states)
            yield row, states.tobytes() + (b"" if pooled is None else pooled.tobytes())


def finish_text(folder: Path, about: Mapping[str, Any], job: Mapping[str, Any]) -> dict[str, Any]:
    """Puts the parts together, once all are there; returns the content of text.json."""
    here, told, tables = folder / FOLDER, [], []
    for part in range(len(about["parts"])):
        _, rows, said = part_paths(here, part)
        told.append(json.loads(said.read_text()))
        tables.append(np.load(rows, allow_pickle=False))
    save_array(here / TABLE, np.concatenate(tables))
    names = ("num_samples", "num_bytes", "sha256")
    parts = [{name: one[name] for name in names} for one in told]
    found = {**job, "tool": f"sdtrain {version('sdtrain')}", "num_samples": about["num_samples"], "parts": parts}
    write_json(here / ABOUT, found)
    return found


def text_job(about: Mapping[str, Any], encoder: Mapping[str, Any]) -> dict[str, Any]:
    """What the embeddings are of, and by what they are made."""
    return {"v": 1, "encoder": dict(encoder), "latents": about["fingerprint"]}


def read_text_about(folder: Path, about: Mapping[str, Any]) -> dict[str, Any] | None:
    """The content of a cache's text.json; None where it has no embeddings."""
    if not (folder / FOLDER / ABOUT).exists():
        return None
    found = json.loads((folder / FOLDER / ABOUT).read_text())
    require_same(found, {"latents": about["fingerprint"]}, f"data.folder: {folder / FOLDER} is of other latents")
    return found


class StoredText:
    """Embeddings by the latents' row.

    Args:
        folder: the cache.
        about: its text.json.
        open_part: a part's bytes, by its number.
    """

    def __init__(self, folder: Path, about: Mapping[str, Any], open_part: Callable[[int], Any]) -> None:
        self.encoder, self._part = about["encoder"], open_part
        self._table = np.load(folder / FOLDER / TABLE, mmap_mode="r", allow_pickle=False).view(np.ndarray)
        if self._table.dtype != ROW or len(self._table) != about["num_samples"]:
            raise ConfigError(f"data.folder: {folder / FOLDER} does not fit its text.json; make it again with --text")

    def read(self, rows: np.ndarray) -> dict[str, np.ndarray]:
        """Of so many samples the states (B, L, D) float16, padded with zeros, which tokens are there, and pooled."""
        found = self._table[rows]
        length, width, pooled_width = (self.encoder[name] for name in ("max_tokens", "width", "pooled_width"))
        states = np.zeros((len(rows), length, width), np.float16)
        pooled = np.zeros((len(rows), pooled_width or 0), np.float16)
        fields = (found[name].tolist() for name in ("part", "offset", "num_tokens"))
        for number, (part, offset, num_tokens) in enumerate(zip(*fields)):
            data = np.frombuffer(self._part(part), np.float16, num_tokens * width + pooled.shape[1], offset)
            states[number, :num_tokens] = data[: num_tokens * width].reshape(num_tokens, width)  # (T, D)
            pooled[number] = data[num_tokens * width :]
        mask = np.arange(length) < found["num_tokens"][:, None]  # (B, L)
        told = {"text_states": states, "text_mask": mask}
        return told | ({"text_pooled": pooled} if pooled_width else {})
