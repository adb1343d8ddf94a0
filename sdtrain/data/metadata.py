"""What a sample's .json says about it in numbers and words, as columns of the index, for filters."""

from __future__ import annotations

import math
import re
from array import array
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np

from sdtrain.data.attributes import parse_json
from sdtrain.data.bad_sample import BadSample
from sdtrain.data.layout import COMPANIONS

# Words are kept for these alone: a caption or an address in every row would be the data set once more.
WORDS = ("language", "license", "nsfw", "source")
MAX_WORD_BYTES = 32
MAX_COLUMNS = 64
# Where a sample's companions lie: columns that an index has where a shard has such members.
COMPANION_COLUMNS = {name: tuple(f"{name}_{what}" for what in ("offset", "size", "crc")) for name in COMPANIONS}
_OURS = {column for columns in COMPANION_COLUMNS.values() for column in columns}
_RENAMED = {"aesthetic_score": "aesthetic", "lang": "language"}
_NAME = re.compile(r"[a-z_][a-z0-9_]{0,63}")


def column_name(name: str) -> str | None:
    """The name a field has in the index, None where it can have none: LAION writes LANGUAGE and AESTHETIC_SCORE."""
    name = name.lower()
    return _RENAMED.get(name, name) if _NAME.fullmatch(name) and name not in _OURS else None


def is_column(name: str) -> bool:
    """Whether an index may have a column of this name."""
    return name in _OURS or column_name(name) == name


def read_fields(data: bytes) -> dict[str, float | bytes] | None:
    """The numbers of a JSON object's first level and the words worth keeping; None where it cannot be read."""
    try:
        return dict(_kept(parse_json(data)))
    except BadSample:
        return None


def _kept(fields: Mapping[str, Any]) -> Iterable[tuple[str, float | bytes]]:
    for field, value in fields.items():
        name = column_name(field)
        if name in WORDS and isinstance(value, str):
            word = value.encode(errors="replace")
            if len(word) <= MAX_WORD_BYTES:
                yield name, word
        elif name and name not in WORDS and isinstance(value, (int, float)):
            try:
                number = float(value)
            except OverflowError:
                continue
            if math.isfinite(number):
                yield name, number


class Columns:
    """Columns that grow a row at a time, with NaN, or no word, where a row has nothing."""

    def __init__(self) -> None:
        self._numbers: dict[str, array] = {}
        self._words: dict[str, list[bytes]] = {}
        self._num_rows = 0

    def append(self, fields: Mapping[str, float | bytes]) -> None:
        """A row. Names beyond the first MAX_COLUMNS are not taken: a stranger's file does not choose our memory."""
        for name in fields.keys() - self._numbers.keys() - self._words.keys():
            if name in WORDS:
                self._words[name] = [b""] * self._num_rows
            elif name in _OURS or len(self._numbers) < MAX_COLUMNS:
                self._numbers[name] = array("d", [math.nan]) * self._num_rows
        for name, numbers in self._numbers.items():
            numbers.append(fields.get(name, math.nan))
        for name, words in self._words.items():
            words.append(fields.get(name, b""))
        self._num_rows += 1

    def arrays(self) -> dict[str, np.ndarray]:
        """Float64, or bytes for words, by name in order."""
        columns = {name: np.array(numbers, np.float64) for name, numbers in self._numbers.items()}
        columns |= {name: np.array(words, np.bytes_) for name, words in self._words.items()}
        return dict(sorted(columns.items()))
