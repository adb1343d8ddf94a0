"""What .json members say, as columns: numbers and a few words, whatever strangers write there."""

import json

import numpy as np
import pytest

from sdtrain.data.metadata import MAX_COLUMNS, Columns, column_name, read_fields


def test_numbers_and_words():
    fields = {"aesthetic": 5, "PWATERMARK": 0.25, "nsfw": "UNLIKELY", "is_art": True, "caption": "x", "LANG": "en"}
    fields |= {"license": "x" * 33, "nested": {"a": 1}, "list": [1], "nothing": None, "AESTHETIC_SCORE": 6, "": 1}
    expected = {"aesthetic": 6.0, "pwatermark": 0.25, "nsfw": b"UNLIKELY", "is_art": 1.0, "language": b"en"}
    assert read_fields(json.dumps(fields).encode()) == expected


@pytest.mark.parametrize("data", [b"", b"[1]", b"7", b"\xff", b"[" * 99999, b"{"])
def test_what_cannot_be_read(data):
    assert read_fields(data) is None


@pytest.mark.parametrize("value", ["1e999", "-1e999", "NaN", "-Infinity", "9" * 400, '"5"'])
def test_numbers_that_are_none(value):
    assert read_fields(f'{{"a": {value}, "b": 1}}'.encode()) == {"b": 1.0}


@pytest.mark.parametrize("name", ["../x", "a b", "1a", "a" * 65, "a.b", "\u00e4", "a\0"])
def test_names_that_are_none(name):
    assert column_name(name) is None


def test_columns_grow_and_are_filled():
    columns = Columns()
    for fields in ({"a": 1.0}, {}, {"b": 2.0, "language": b"en"}, {"a": 3.0, "language": b"deu"}):
        columns.append(fields)
    arrays = columns.arrays()
    np.testing.assert_array_equal(arrays["a"], [1, np.nan, np.nan, 3])
    np.testing.assert_array_equal(arrays["b"], [np.nan, np.nan, 2, np.nan])
    assert arrays["language"].tolist() == [b"", b"", b"en", b"deu"]
    assert list(arrays) == ["a", "b", "language"]


def test_nobody_chooses_how_many_there_are():
    columns = Columns()
    for number in range(10):
        columns.append({f"name_{number}_{place}": 1.0 for place in range(1000)})
    assert len(columns.arrays()) == MAX_COLUMNS
