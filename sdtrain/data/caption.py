"""Caption bytes -> a clean string. One code path for every reader of captions."""

from __future__ import annotations

import unicodedata

from sdtrain.data.bad_sample import BadSample

MAX_CAPTION_BYTES = 64 * 1024
_MAX_REPLACED_FRACTION = 0.01

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
    text = unicodedata.normalize("NFC", text).translate(_DROP)
    return " ".join(text.split())
