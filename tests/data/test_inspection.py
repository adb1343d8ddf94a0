"""The numbers that say what is in some shards."""

import dataclasses
import json

import numpy as np
import pytest

from sdtrain.data.index import build_index
from sdtrain.data.inspection import aspects, num_bytes, quantiles, repeats, sides, spreads, words
from sdtrain.data.layout import CAPTION, IMAGE


@pytest.fixture
def index(make_shards, make_sample):
    """Six samples: 0 and 3 have one picture, 1, 2 and 4 have one caption, 5 has neither words nor size."""
    samples = [make_sample(n, json=json.dumps({"language": "de" if n else "en"}).encode()) for n in range(6)]
    samples[3]["png"] = samples[0]["png"]
    samples[1]["txt"] = samples[2]["txt"] = samples[4]["txt"]
    samples[5] |= {"png": b"<html>", "json": b"{}"}
    del samples[5]["txt"]
    index = build_index(make_shards(samples, per_shard=4))
    side = np.array([[100, 100], [160, 90], [30, 300], [2000, 100], [4000, 3000], [0, 0]], np.int32)
    return dataclasses.replace(index, side=side)


def test_quantiles():
    assert quantiles(np.arange(101)) == {"min": 0, "5%": 5, "50%": 50, "95%": 95, "max": 100, "mean": 50}
    assert quantiles(np.array([])) == {}


def test_shapes(index):
    assert {name: count for name, count in aspects(index).items() if count} == {"1:4": 1, "1:1": 1, "4:3": 1} | {
        "16:9": 1,
        "4:1": 1,
    }
    assert sides(index) == {"unreadable": 1, "1 to 63": 1, "64 to 127": 3, "2048 and more": 1}
    assert spreads(index)["width"]["min"] == 30
    assert spreads(index)["samples a shard"]["max"] == 4


def test_repeats(index):
    assert repeats(index, IMAGE) == (1, 1, 2, "x-000000/000000")
    assert repeats(index, CAPTION) == (2, 1, 3, "x-000000/000001")
    assert repeats(index.subset(slice(0, 2)), IMAGE) == (0, 0, 0, "")


def test_words_and_bytes(index):
    assert words(index) == {"language": {"de": 4, "en": 1, "(none)": 1}}
    assert num_bytes(index)["captions"] == sum(size for size in index.size[:, CAPTION].tolist() if size > 0)
