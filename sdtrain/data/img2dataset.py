"""img2dataset's tables: `NNNNN.parquet` beside `NNNNN.tar`, a row a download, those that failed included."""

from __future__ import annotations

import io
from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from sdtrain.data.address import is_remote
from sdtrain.data.metadata import MAX_COLUMNS, MAX_WORD_BYTES, WORDS, column_name
from sdtrain.errors import ConfigError

if TYPE_CHECKING:
    from pyarrow import ChunkedArray, Schema

_OWN = ("key", "status")
MAX_TABLE_BYTES = 256 << 20
_MAX_ROWS = 2_000_000  # a shard has thousands


class Table(NamedTuple):
    """What the table says of a shard's samples, in their order."""

    columns: dict[str, np.ndarray]
    num_missing: int  # rows of successful downloads whose sample the shard does not have
    num_unknown: int  # samples that no row speaks of


def table_address(shard: str) -> str:
    """Where img2dataset puts a shard's table."""
    path, mark, query = shard.partition("?") if is_remote(shard) else (shard, "", "")
    return f"{path.removesuffix('.tar')}.parquet{mark}{query}"


def read_table(data: bytes, name: str, keys: Sequence[bytes]) -> Table | None:
    """The rows of these samples; None where it is no table of img2dataset's. Raises ConfigError without pyarrow."""
    try:
        from pyarrow import ArrowException
        from pyarrow.parquet import ParquetFile
    except ImportError as error:
        raise ConfigError(
            f"{name} is img2dataset's table, and pyarrow, which reads it, is not installed: "
            "pip install 'sdtrain[parquet]', or move the .parquet files away from the shards"
        ) from error
    try:
        parquet = ParquetFile(io.BytesIO(data))
        if parquet.metadata.num_rows > _MAX_ROWS or not {*_OWN} <= {*parquet.schema_arrow.names}:
            return None
        wanted = _wanted(parquet.schema_arrow)
        table = parquet.read([*_OWN, *wanted])
    except (ArrowException, OSError, ValueError):
        return None
    succeeded = [status == "success" for status in table["status"].to_pylist()]
    row_of = {str(key).encode(): row for row, key in enumerate(table["key"].to_pylist()) if succeeded[row]}
    rows = np.array([row_of.get(key, -1) for key in keys], np.int64)
    columns = {column_name(field): _column(table[field], rows, column_name(field) in WORDS) for field in wanted}
    num_known = int((rows >= 0).sum())
    return Table(columns, len(row_of) - num_known, len(keys) - num_known)


def _wanted(schema: Schema) -> list[str]:
    """Fields of numbers, and of words worth keeping; of two that come to one name the first."""
    from pyarrow import types

    names: dict[str, str] = {}
    for field in schema:
        name, kind = column_name(field.name), field.type
        is_number = types.is_integer(kind) or types.is_floating(kind) or types.is_boolean(kind)
        is_word = types.is_string(kind) or types.is_large_string(kind)
        if name and name not in _OWN and (is_word if name in WORDS else is_number) and len(names) < MAX_COLUMNS:
            names.setdefault(name, field.name)
    return list(names.values())


def _column(values: ChunkedArray, rows: np.ndarray, is_words: bool) -> np.ndarray:
    """The values at some rows; NaN, or no word, where the row is -1 or empty."""
    if is_words:
        words = [(word or "").encode(errors="replace") for word in values.to_pylist()]
        return np.array([words[row] if row >= 0 and len(words[row]) <= MAX_WORD_BYTES else b"" for row in rows], "S")
    numbers = np.append(values.cast("float64", safe=False).to_numpy(), np.nan)  # row -1 is the NaN
    return numbers[rows]
