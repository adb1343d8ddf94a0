"""Whether the captions that a run asks for are there, looked at before it trains on none."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from itertools import islice
from typing import Any

from sdtrain.data.bad_sample import BadSample
from sdtrain.data.caption import CaptionRule
from sdtrain.errors import ConfigError

NUM_LOOKED = 256  # samples at most
_NUM_NAMED = 8  # fields that a message lists
_MAX_DEPTH = 3

Texts = tuple[bytes | None, Mapping[str, Any] | None]  # the .txt and the .json member of a sample


def check_captions(rule: CaptionRule, samples: Iterable[Texts], option: str) -> str:
    """A note for people, "" where all is well. Looks at samples until each field was seen to hold a caption.

    A data set without any text, of which nothing but the .txt members was asked for, is one to learn from pictures.

    Args:
        rule: says which fields are asked for.
        samples: some of those to train on, spread over all; what cannot be read is left out.
        option: where the configuration has the rule.

    Raises:
        ConfigError: where no sample has a caption in any of the fields, naming what there is.
    """
    missing, there, num = dict.fromkeys(rule.fields), Counter(), 0
    for text, metadata in islice(samples, NUM_LOOKED):
        num += 1
        there.update(dict.fromkeys(_names(text, metadata), 1))
        for name in [name for name in missing if _has(rule, name, text, metadata)]:
            del missing[name]
        if not missing:
            return ""
    if not num:
        return ""
    asked = ", ".join(missing)
    if len(missing) < len(rule.fields):
        return f"{option}.fields: none of {num} samples has {asked}; the other fields take its share"
    if not there and set(rule.fields) == {"txt"} and rule.empty == "unconditional":
        return f"none of {num} samples has a caption; the run learns from pictures without words"
    found = ", ".join(name for name, _ in there.most_common(_NUM_NAMED)) or "no text at all"
    raise ConfigError(
        f"{option}.fields: none of {num} samples has a caption in {asked}; there is {found}. Name a field that is "
        "there, or set conditioner=none to train without captions"
    )


def _has(rule: CaptionRule, name: str, text: bytes | None, metadata: Mapping[str, Any] | None) -> bool:
    try:
        return bool(rule.captions(name, text, metadata))
    except BadSample:
        return True  # it is there, and counted as bad when it is read


def _names(text: bytes | None, metadata: Mapping[str, Any] | None) -> Iterator[str]:
    if text and text.strip():
        yield "txt"
    yield from _strings("json", metadata or {}, _MAX_DEPTH)


def _strings(name: str, value: Any, depth: int) -> Iterator[str]:  # noqa: ANN401 JSON
    if isinstance(value, Mapping) and depth:
        for key, inner in value.items():
            yield from _strings(f"{name}.{key}", inner, depth - 1)
    elif any(isinstance(one, str) and one.strip() for one in (value if isinstance(value, list) else [value])):
        yield name
