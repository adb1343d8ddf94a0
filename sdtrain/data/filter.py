"""Which samples of an index are trained on: plain comparisons such as "aesthetic >= 5" and "language == en"."""

from __future__ import annotations

import difflib
import operator
import re
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np

from sdtrain.data.index import Index
from sdtrain.data.metadata import column_name
from sdtrain.errors import ConfigError

_OPERATORS: dict[str, Callable[[Any, Any], np.ndarray]] = {
    ">=": operator.ge,
    "<=": operator.le,
    "==": operator.eq,
    "!=": operator.ne,
    ">": operator.gt,
    "<": operator.lt,
}
_COMPARISON = re.compile(r"\s*([A-Za-z_]\w*)\s*(>=|<=|==|!=|<|>)\s*([^\s<>=!](?:.*\S)?)\s*", re.ASCII)
_NUMBER = re.compile(r"[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?", re.ASCII)


class Comparison(NamedTuple):
    """One of the conditions, as it was written and as it is applied."""

    text: str
    column: str
    operator: str
    value: str


def apply(index: Index, comparisons: Sequence[str], option: str = "data.filter") -> tuple[Index, dict[str, int]]:
    """The samples that pass all comparisons, and how many each took out of those that the ones before it left.

    What a sample does not tell fails. The subset's fingerprint says which samples are left.
    """
    passed, counts = select(index, comparisons, option)
    return (index.subset(passed) if counts else index), counts


def select(index: Index, comparisons: Sequence[str], option: str = "data.filter") -> tuple[np.ndarray, dict[str, int]]:
    """`apply` without a copy of the samples: (N,) bool, whether each passes."""
    passed, counts = np.ones(len(index), bool), {}
    for comparison in [parse(text, option) for text in comparisons]:
        before = int(passed.sum())
        passed &= _passes(index, comparison, option)
        counts[comparison.text] = before - int(passed.sum())
    if len(index) and not passed.any():
        raise ConfigError(f"{option}: none of {len(index)} samples passes {_told(counts)}; loosen it")
    return passed, counts


def parse(text: str, option: str = "data.filter") -> Comparison:
    """A column, an operator, and a number or a word. Raises ConfigError."""
    found = _COMPARISON.fullmatch(text) if isinstance(text, str) else None
    if not found:
        raise ConfigError(
            f"{option}: {text!r} is not COLUMN OPERATOR VALUE, such as 'aesthetic >= 5' or 'language == en'; "
            f"the operators are {' '.join(_OPERATORS)}"
        )
    return Comparison(" ".join(found.groups()), *found.groups())


def _passes(index: Index, comparison: Comparison, option: str) -> np.ndarray:
    values, is_known = _column(index, comparison, option)
    if values.dtype.kind == "S":
        if comparison.operator not in ("==", "!="):
            raise ConfigError(f"{option}: '{comparison.text}': {comparison.column} holds words; compare with == or !=")
        value: Any = comparison.value.strip("'\"").encode()
    elif _NUMBER.fullmatch(comparison.value):
        value = float(comparison.value)
    else:
        raise ConfigError(f"{option}: '{comparison.text}': {comparison.column} holds numbers, which this is not")
    return _OPERATORS[comparison.operator](values, value) & is_known


def _column(index: Index, comparison: Comparison, option: str) -> tuple[np.ndarray, np.ndarray]:
    """The values, and where there is one. Sides are the picture's own, whatever its metadata says."""
    name = column_name(comparison.column) or comparison.column  # as the index has it
    if name in ("width", "height"):
        side = index.side[:, ("width", "height").index(name)]
        return side, side > 0
    if name == "caption_length":
        return np.asarray(index.caption_length), np.ones(len(index), bool)
    if name not in index.columns:
        names = sorted({"width", "height", "caption_length", *index.columns})
        near = difflib.get_close_matches(name, names, 1)
        raise ConfigError(
            f"{option}: '{comparison.text}': no sample tells '{name}'"
            + (f"; did you mean '{near[0]}'?" if near else f"; they tell {', '.join(names)}")
        )
    values = np.asarray(index.columns[name])
    return values, (values != b"" if values.dtype.kind == "S" else ~np.isnan(values))


def _told(counts: dict[str, int]) -> str:
    return ", ".join(f"'{text}' (takes {count})" for text, count in counts.items())
