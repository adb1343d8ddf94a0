"""A sample that cannot be trained on, and the closed list of reasons: it is replaced and counted, never fatal."""

from __future__ import annotations

REASONS = (
    "not_an_image",
    "image_too_large",
    "too_many_pixels",
    "too_small",
    "decode_error",
    "other_size",
    "no_source",
    "caption_too_large",
    "caption_not_utf8",
    "empty_caption",
    "bad_json",
    "crc_mismatch",
    "replaced_in_latents",
)


class BadSample(Exception):
    """Raised by whoever reads a sample. `reason` is one of REASONS, `detail` is for people."""

    def __init__(self, reason: str, detail: str = "") -> None:
        super().__init__(f"{reason}: {detail}" if detail else reason)
        self.reason = reason
