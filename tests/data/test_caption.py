"""Caption bytes become clean strings, or a reason."""

import pytest

from sdtrain.data.bad_sample import BadSample
from sdtrain.data.caption import MAX_CAPTION_BYTES, clean_caption


@pytest.mark.parametrize(
    ("data", "text"),
    [
        (b"", ""),
        (b" \n\t ", ""),
        (b"  a red\r\n star \t on  white ", "a red star on white"),
        (b"\xef\xbb\xbfwith a byte order mark", "with a byte order mark"),
        (b"a\x00b \x07\x1b[31m c \x00 d", "ab [31m c d"),
        ("cafe\u0301".encode(), "caf\u00e9"),
        ("left \u202eright\u202c\u2066x\u2069".encode(), "left rightx"),
        ("c1 \u0085 next\u009f".encode(), "c1 next"),
        ("\u4e00 \U0001f600".encode(), "\u4e00 \U0001f600"),
    ],
)
def test_clean(data, text):
    assert clean_caption(data) == text


def test_one_broken_byte_in_a_long_caption_is_replaced():
    assert clean_caption(b"x" * 200 + b"\xff") == "x" * 200 + "\ufffd"


@pytest.mark.parametrize("data", [b"\xff\xfe\xfa", "ein stra\xdfe".encode("latin-1"), b"\x89PNG\r\n\x1a\n\xff\xff"])
def test_what_is_not_utf8_is_bad(data):
    with pytest.raises(BadSample) as error:
        clean_caption(data)
    assert error.value.reason == "caption_not_utf8"


def test_size_limit():
    assert len(clean_caption(b"x" * MAX_CAPTION_BYTES)) == MAX_CAPTION_BYTES
    for num_bytes in (MAX_CAPTION_BYTES + 1, 1_000_000):
        with pytest.raises(BadSample) as error:
            clean_caption(b"x" * num_bytes)
        assert error.value.reason == "caption_too_large"
