"""A sample's .json member -> a dictionary, within limits that hold for a stranger's bytes."""

from __future__ import annotations

import json
import re
from typing import Any

from sdtrain.data.bad_sample import BadSample

_MAX_DEPTH = 32
_STRING = re.compile(rb'"(?:[^"\\]|\\.)*+"?', re.DOTALL)  # also one that never ends, or the search is quadratic
_BRACKET = re.compile(rb"[\[{\]}]")


def parse_json(data: bytes) -> dict[str, Any]:
    """The object. What is nested deeply, and what is no object are refused; NaN and Infinity, which img2dataset writes
    for numbers that are missing, are None.

    Raises:
        BadSample: with the reason.
    """
    if data.count(b"[") + data.count(b"{") > _MAX_DEPTH:
        _check_depth(data)
    try:
        value = json.loads(data, parse_constant=_nothing)
    except (ValueError, RecursionError) as error:
        raise BadSample("bad_json", str(error)) from error
    if not isinstance(value, dict):
        raise BadSample("bad_json", "not an object")
    return value


def _check_depth(data: bytes) -> None:
    """Before it is parsed: at the limit of Python's own recursion, finalizers of other objects fail, too."""
    depth = 0
    for bracket in _BRACKET.findall(_STRING.sub(b"", data)):
        depth += 1 if bracket in b"[{" else -1
        if depth > _MAX_DEPTH:
            raise BadSample("bad_json", f"nested more than {_MAX_DEPTH} deep")


def _nothing(_constant: str) -> None:
    return None
