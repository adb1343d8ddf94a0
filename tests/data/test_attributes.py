"""The .json member, also of those who mean no good."""

import json
import time

import pytest

from sdtrain.data.attributes import parse_json
from sdtrain.data.bad_sample import BadSample


def nested(depth):
    return b'{"a":' * depth + b"1" + b"}" * depth


def test_an_object():
    assert parse_json(b'{"a": [1, 2.5, null, "x"], "b": {"c": true}}') == {"a": [1, 2.5, None, "x"], "b": {"c": True}}
    assert parse_json(nested(32))
    assert len(parse_json(b'{"a": [' + b"[]," * 1000 + b"[]]}")["a"]) == 1001


def test_what_pandas_lacks_is_nothing():
    data = json.dumps({"a": float("nan"), "b": [float("-inf"), 1]}).encode()
    assert parse_json(data) == {"a": None, "b": [None, 1]}


def test_brackets_in_words_do_not_count():
    assert parse_json(b'{"a": "' + b"[" * 100 + b'"}') == {"a": "[" * 100}
    assert parse_json(b'{"a": "\\"' + b"[" * 100 + b'\\\\"}') == {"a": '"' + "[" * 100 + "\\"}


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"[1]",
        b'{"a": 1',
        b"\xff\xfe",
        nested(33),
        b"[" * 200_000,
        b'{"a": "\\"' + b"[" * 100 + b'\\\\", "b": ' + b"[" * 40,
        b'{"a": ' + b"9" * 100_000 + b"}",
        b'["' + b'\\"[' * 60_000,
        b"[" * 40 + b'"' + b"\\" * 100_001,
    ],
)
def test_refused_at_once(data):
    started = time.monotonic()
    with pytest.raises(BadSample, match="bad_json"):
        parse_json(data)
    assert time.monotonic() - started < 1
