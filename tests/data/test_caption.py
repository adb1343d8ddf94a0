"""Caption bytes become clean strings, or a reason; a rule chooses among them."""

import json
import time
import unicodedata
from collections import Counter

import pytest

from sdtrain.data.bad_sample import REASONS, BadSample
from sdtrain.data.caption import MAX_CAPTION_BYTES, CaptionRule, clean_caption
from sdtrain.errors import ConfigError


@pytest.mark.parametrize(
    ("data", "text"),
    [
        (b"", ""),
        (b" \n\t ", ""),
        (b"  a red\r\n star \t on  white ", "a red star on white"),
        (b"\xef\xbb\xbfwith a byte order mark", "with a byte order mark"),
        (b"a\x00b \x07\x1b[31m c \x00 d", "ab [31m c d"),
        ("cafe\u0301".encode(), "caf\u00e9"),
        ("cafe\x00\u0301".encode(), "caf\u00e9"),
        ("left \u202eright\u202c\u2066x\u2069".encode(), "left rightx"),
        ("".join(map(chr, (0x61C, 0x200E, 0x200F, *range(0x202A, 0x202F), *range(0x2066, 0x206A)))).encode(), ""),
        ("c1 \u0085 next\u009f".encode(), "c1 next"),
        ("\u2028 \u3000 x".encode(), "x"),
        ("\u4e00 \U0001f600".encode(), "\u4e00 \U0001f600"),
        ("\u202e\u0000".encode(), ""),
    ],
)
def test_clean(data, text):
    assert clean_caption(data) == text


def test_no_control_is_left():
    everything = "".join(chr(c) for c in range(0x110000) if not 0xD800 <= c < 0xE000)
    kept = [clean_caption(everything[start : start + 9000].encode()) for start in range(0, len(everything), 9000)]
    assert {c for text in kept for c in text if unicodedata.category(c) == "Cc"} == set()
    assert {c for text in kept for c in text if unicodedata.bidirectional(c) in {"RLO", "LRO", "RLI", "FSI"}} == set()


def test_one_broken_byte_in_a_long_caption_is_replaced():
    assert clean_caption(b"x" * 200 + b"\xff") == "x" * 200 + "\ufffd"
    with pytest.raises(BadSample):
        clean_caption(b"x" * 200 + b"\xff" * 3)


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


def test_thousands_of_marks_on_a_letter_take_no_seconds():
    start = time.process_time()
    text = clean_caption(("a" + "\u0301" * 16_000 + "\u0327" * 16_000).encode())
    assert time.process_time() - start < 0.5
    assert text == "\u00e1" + "\u0301" * 29


ANSWERS = {
    "short": "a dog",
    "many": ["one", "two", " ", "three"],
    "deep": {"text": "in there"},
    "number": 3,
    "no": None,
}


def told(rule, text=b"from txt", metadata=ANSWERS, num_draws=2000):
    """How often each is told, over evenly spread draws."""
    counts = Counter(rule(text, metadata, (i + 0.5) / num_draws) for i in range(num_draws))
    return {caption: count / num_draws for caption, count in counts.items()}


def test_the_txt_member_is_told():
    assert told(CaptionRule()) == {"from txt": 1}
    assert CaptionRule()(b"  two\nlines\x00 ", None, 0.3) == "two lines"


def test_weights():
    rule = CaptionRule({"txt": 0.7, "json.short": 0.2, "json.deep.text": 0.1})
    assert told(rule) == {"from txt": 0.7, "a dog": 0.2, "in there": 0.1}
    assert told(CaptionRule({"json.short": 6, "txt": 2})) == {"from txt": 0.25, "a dog": 0.75}


def test_a_list_shares_its_weight():
    shares = told(CaptionRule({"txt": 1, "json.many": 3}), num_draws=4000)
    assert shares == {"from txt": 0.25, "one": 0.25, "two": 0.25, "three": 0.25}


@pytest.mark.parametrize(
    "metadata", [None, {}, {"short": ""}, {"short": 3}, {"short": {}}, {"short": [None, "\u202e"]}]
)
def test_what_is_missing_leaves_its_share_to_the_others(metadata):
    rule = CaptionRule({"txt": 0.1, "json.short": 0.6, "json.number": 0.1, "json.short.deeper": 0.2})
    assert told(rule, metadata=metadata) == {"from txt": 1}
    assert told(CaptionRule({"json.short": 0.6, "txt": 0.1}), b" ") == {"a dog": 1}
    assert told(CaptionRule({"json.short": 0.6, "txt": 0.1}), None) == {"a dog": 1}


def test_the_same_draw_tells_the_same():
    rule = CaptionRule({"txt": 0.5, "json.many": 0.5})
    assert told(rule) == told(rule)
    for draw in (0.0, 0.5, 0.999999999, 1 - 2**-53):
        assert rule(b"from txt", ANSWERS, draw) == rule(b"from txt", ANSWERS, draw) != ""


def test_words_around_it():
    rule = CaptionRule(prefix="photo: ", template="an image of {caption}, {caption}")
    assert rule(b"a {caption} {0}", None, 0) == "photo: an image of a {caption} {0}, a {caption} {0}"
    assert CaptionRule(template="{0} {caption} {}")(b"a dog", None, 0) == "{0} a dog {}"


def test_an_empty_caption_is_the_unconditional_one_or_no_use():
    words = {"prefix": "photo: ", "template": "of {caption}"}
    for text, metadata in ((None, None), (b"", {}), (b"\x00 \n", {"short": " "})):
        assert CaptionRule({"txt": 1, "json.short": 1}, **words)(text, metadata, 0.7) == ""
        with pytest.raises(BadSample) as error:
            CaptionRule({"txt": 1, "json.short": 1}, **words, empty="drop")(text, metadata, 0.7)
        assert error.value.reason == "empty_caption"
        assert error.value.reason in REASONS


@pytest.mark.parametrize(
    ("text", "most", "wanted"),
    [
        ("one two three", 13, "one two three"),
        ("one two three", 12, "one two"),
        ("one two three", 7, "one two"),
        ("one two three", 6, "one"),
        ("incomprehensible", 5, "incom"),
        ("\u4e00\u4e8c\u4e09", 2, "\u4e00\u4e8c"),
    ],
)
def test_what_is_too_long_is_cut_between_words(text, most, wanted):
    assert CaptionRule(max_characters=most)(text.encode(), None, 0) == wanted


@pytest.mark.parametrize("draw", [0.0, 0.99])
def test_a_sample_is_bad_by_its_bytes_not_by_the_draw(draw):
    rule = CaptionRule({"txt": 0.5, "json.short": 0.5})
    for text, metadata in ((b"\xff\xfe\xfd", ANSWERS), (b"good", {"short": "x" * 70_000}), (b"x" * 1_000_000, ANSWERS)):
        with pytest.raises(BadSample):
            rule(text, metadata, draw)
    with pytest.raises(BadSample):
        rule(b"good", json.loads('{"short": "half \\ud83d"}'), draw)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"fields": {}}, "fields is empty"),
        ({"fields": {"caption": 1}}, "'caption' is neither txt nor json.NAME"),
        ({"fields": {"json.": 1}}, "neither txt nor"),
        ({"fields": {"txt": 0}}, "the weight of txt is 0"),
        ({"fields": {"txt": float("nan")}}, "the weight of txt is nan"),
        ({"fields": {"txt": "often"}}, "the weight of txt is often"),
        ({"fields": ["txt"]}, "has no weights; write {txt: 1.0}"),
        ({"template": "a picture"}, "has no {caption}"),
        ({"max_characters": 0}, "max_characters: 0"),
        ({"empty": "skip"}, "'skip' is neither"),
    ],
)
def test_a_wrong_rule_says_so(options, message):
    with pytest.raises(ConfigError, match=message):
        CaptionRule(**options)


def test_every_control_goes_from_the_middle_of_a_word():
    controls = [*range(0x20), *range(0x7F, 0xA0), 0x61C, 0x200E, 0x200F, *range(0x202A, 0x202F), *range(0x2066, 0x206A)]
    for control in map(chr, [*controls, 0xFEFF]):
        assert clean_caption(f"a{control}b".encode()) == ("a b" if control.isspace() else "ab"), hex(ord(control))
