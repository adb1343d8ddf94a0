"""Caption bytes -> a clean string, and which of a sample's captions is told, in what words.

One code path for every reader of captions.
"""

from __future__ import annotations

import math
import unicodedata
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from sdtrain.data.bad_sample import BadSample
from sdtrain.errors import ConfigError

MAX_CAPTION_BYTES = 64 * 1024
_MAX_REPLACED_FRACTION = 0.01
_MAX_MARKS = 30  # on one letter, as in Unicode's stream-safe text (UAX 15): to sort more takes quadratic time
_PLACE = "{caption}"

# C0, C1 and DEL without those that count as white space; controls of writing direction; the byte order mark.
_DROPPED = [c for c in (*range(0x20), *range(0x7F, 0xA0)) if not chr(c).isspace()]
_DROPPED += [0x061C, 0x200E, 0x200F, *range(0x202A, 0x202F), *range(0x2066, 0x206A), 0xFEFF]
_DROP = dict.fromkeys(_DROPPED)


def clean_caption(data: bytes) -> str:
    """UTF-8, NFC, no control characters, single spaces. An empty caption stays "": the unconditional one."""
    if len(data) > MAX_CAPTION_BYTES:
        raise BadSample("caption_too_large", f"{len(data)} bytes")
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError as error:
        text = data.decode("utf-8", errors="replace")
        if text.count("\ufffd") > _MAX_REPLACED_FRACTION * len(text):
            raise BadSample("caption_not_utf8") from error
    if not text.isprintable():  # nothing printable is dropped
        text = text.translate(_DROP)
    if not text.isascii():  # after the controls, which may have stood between a letter and its mark
        text = unicodedata.normalize("NFC", _with_few_marks(text))
    return " ".join(text.split())


def _with_few_marks(text: str) -> str:
    kept, run = [], 0
    for letter in text:
        run = run + 1 if unicodedata.combining(letter) else 0
        if run <= _MAX_MARKS:
            kept.append(letter)
    return "".join(kept)


@dataclass(frozen=True)
class CaptionRule:
    """Which caption a sample is told, among those it has.

    Args:
        fields: where captions stand, and how often each is taken: "txt" is the .txt member, "json.short_caption" a
            field of the .json member, "json.a.b" one inside of it. A list of captions there shares its weight among
            them. Where a sample lacks some, the others are taken in their proportions. None: {txt: 1.0}.
        template: what is told, with {caption} for the caption.
        prefix: stands before all of it.
        max_characters: what is longer is cut, between words where there are some; null for no limit.
        empty: a sample without any caption is trained "unconditional", with neither template nor prefix, or is of no
            use and replaced ("drop").
    """

    fields: Mapping[str, float] | None = None
    template: str = _PLACE
    prefix: str = ""
    max_characters: int | None = None
    empty: Literal["unconditional", "drop"] = "unconditional"

    def __post_init__(self) -> None:
        if self.fields is None:
            object.__setattr__(self, "fields", {"txt": 1.0})
        if not isinstance(self.fields, Mapping):
            raise ConfigError(f"caption.fields: {self.fields} has no weights; write {{txt: 1.0}}")
        for name, weight in self.fields.items():
            if name != "txt" and not (name.startswith("json.") and all(name.split("."))):
                raise ConfigError(f"caption.fields: '{name}' is neither txt nor json.NAME")
            if not (isinstance(weight, int | float) and math.isfinite(weight) and weight > 0):
                raise ConfigError(f"caption.fields: the weight of {name} is {weight}; it must be above 0")
        if not self.fields:
            raise ConfigError("caption.fields is empty; write {txt: 1.0}")
        if _PLACE not in self.template:
            raise ConfigError(f"caption.template: '{self.template}' has no {_PLACE} in it")
        if self.max_characters is not None and self.max_characters < 1:
            raise ConfigError(f"caption.max_characters: {self.max_characters} is not above 0; write null for no limit")
        if self.empty not in ("unconditional", "drop"):
            raise ConfigError(f"caption.empty: '{self.empty}' is neither unconditional nor drop")

    def __call__(self, text: bytes | None, metadata: Mapping[str, Any] | None, draw: float) -> str:
        """The caption that a draw from [0, 1) chooses.

        Raises:
            BadSample: for a caption that cannot be read, also when another was drawn: a sample is good or bad by its
                bytes alone.
        """
        fields = self.fields.items()
        found = [(weight, told) for name, weight in fields if (told := self.captions(name, text, metadata))]
        if not found:
            if self.empty == "drop":
                raise BadSample("empty_caption")
            return ""
        place = draw * sum([weight for weight, _ in found])
        while place >= found[0][0] and len(found) > 1:
            place -= found.pop(0)[0]
        weight, captions = found[0]
        number = min(int(place / weight * len(captions)), len(captions) - 1)
        return self._cut(self.prefix + self.template.replace(_PLACE, captions[number]))

    def captions(self, name: str, text: bytes | None, metadata: Mapping[str, Any] | None) -> list[str]:
        """What stands in a field, clean; without what is empty or no text."""
        if name == "txt":
            values = [text or b""]
        else:
            value: Any = metadata
            for part in name.split(".")[1:]:
                value = value.get(part) if isinstance(value, Mapping) else None
            values = value if isinstance(value, list) else [value]
            # JSON can hold halves of characters, which UTF-8 cannot: they are as broken as broken bytes.
            values = [value.encode("utf-8", "surrogatepass") for value in values if isinstance(value, str)]
        return [caption for value in values if (caption := clean_caption(value))]

    def _cut(self, text: str) -> str:
        if self.max_characters is None or len(text) <= self.max_characters:
            return text
        whole_words = text[: self.max_characters + 1].rpartition(" ")[0]
        return whole_words.rstrip() or text[: self.max_characters]
