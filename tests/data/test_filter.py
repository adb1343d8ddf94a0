"""Filters: plain comparisons, strictly read, over what the samples tell."""

import json

import numpy as np
import pytest

from sdtrain.data.filter import apply, parse
from sdtrain.data.index import build_index
from sdtrain.errors import ConfigError


@pytest.fixture
def index(make_shards, make_sample):
    told = [
        {"aesthetic": 6.5, "punsafe": 0.1, "language": "en", "width": 9999},
        {"aesthetic": 4, "punsafe": 0.9, "LANGUAGE": "de"},
        {"AESTHETIC_SCORE": 5, "language": "en"},
        {"punsafe": 0.2},
        {},
    ]
    return build_index(
        make_shards([make_sample(n, json=json.dumps(t).encode(), txt=b"x" * n) for n, t in enumerate(told)], 2)
    )


def kept(index, *comparisons):
    subset, counts = apply(index, comparisons)
    assert len(index) - len(subset) == sum(counts.values())
    return [int(key) for key in subset.key], list(counts.values())


@pytest.mark.parametrize(
    ("comparison", "expected"),
    [
        ("aesthetic >= 5", [0, 2]),
        ("aesthetic>5", [0]),
        ("aesthetic < 5.0", [1]),
        ("aesthetic != 4", [0, 2]),
        ("aesthetic == 4e0", [1]),
        ("language == en", [0, 2]),
        ("language == 'en'", [0, 2]),
        ("LANGUAGE == en", [0, 2]),
        ("AESTHETIC_SCORE > 5", [0]),
        ("language != en", [1]),
        ("width >= 16", [0, 1, 2, 3, 4]),
        ("height <= 16", [0, 1, 2, 3, 4]),
        ("caption_length > 2", [3, 4]),
    ],
)
def test_what_passes(index, comparison, expected):
    assert kept(index, comparison)[0] == expected


def test_counts_and_fingerprint(index):
    assert kept(index, "punsafe < 0.5", "aesthetic >= 5") == ([0], [3, 1])
    assert kept(index, "aesthetic >= 5", "punsafe < 0.5") == ([0], [3, 1])
    subset, counts = apply(index, ["punsafe < 0.5"])
    assert counts == {"punsafe < 0.5": 3}
    assert len({index.fingerprint, subset.fingerprint, apply(index, ["punsafe < 0.15"])[0].fingerprint}) == 3
    assert subset.columns["punsafe"].tolist() == [0.1, 0.2]
    same, counts = apply(index, [])
    assert same is index
    assert counts == {}


def test_metadata_does_not_lie_about_the_size(index):
    assert index.columns["width"][0] == 9999
    with pytest.raises(ConfigError, match=r"none of 5 samples passes 'width > 16' \(takes 5\)"):
        apply(index, ["width > 16"])


def test_a_header_that_cannot_be_read_has_no_size(make_shards, make_sample):
    index = build_index(make_shards([make_sample(0, png=b"<html>"), make_sample(1)]))
    assert kept(index, "width < 100")[0] == [1]


@pytest.mark.parametrize(
    "text",
    ["", "aesthetic", "aesthetic >= ", ">= 5", "a b == 3", "5 < aesthetic", "1 < a < 3", "aesthetic => 5", "a === 5"]
    + ["__import__('os')", "a.b > 3", "a >= 5; b", 5, None],
)
def test_what_is_not_a_comparison(index, text):
    with pytest.raises(ConfigError, match=r"^data\.filter: "):
        apply(index, [text])


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("aestetic > 5", r"no sample tells 'aestetic'; did you mean 'aesthetic'\?"),
        ("zzz > 5", r"they tell aesthetic, caption_length, height, language, punsafe, width"),
        ("language > en", "holds words"),
        ("aesthetic == high", "holds numbers"),
        ("aesthetic == nan", "holds numbers"),
    ],
)
def test_what_cannot_be_compared(index, text, said):
    with pytest.raises(ConfigError, match=said):
        apply(index, [text])


def test_parse_keeps_the_words():
    assert parse("  language==pt br ") == ("language == pt br", "language", "==", "pt br")


def test_a_column_that_some_shards_do_not_have(index):
    assert np.isnan(index.columns["aesthetic"][3:]).all()
    assert index.columns["language"][3:].tolist() == [b"", b""]
