"""Batches by sample number: contents, replacement, accounting, cache, latents."""

import numpy as np
import pytest
import torch

from sdtrain.data.index import build_index
from sdtrain.data.reader import Reader
from sdtrain.errors import ConfigError

BAD = {
    3: {"png": b"<html>"},
    4: {"txt": b"x" * 1_000_000},
    9: {"txt": b"\xff\xfe\xfd\xfc"},
    11: {"json": b'{"a": NaN}'},
    12: {"json": b"[" * 100_000},
    19: {"png": b""},  # the last one: its place goes to the first
}


@pytest.fixture
def index(make_shards, make_sample):
    return build_index(make_shards([make_sample(number, **BAD.get(number, {})) for number in range(20)], per_shard=7))


def batch(reader, ids, **options):
    return reader.batch(np.array(ids), np.zeros(len(ids)), **options)


def pixel(value):
    return np.float32(value) / np.float32(127.5) - 1


def test_batch_contents(index):
    out = batch(Reader(index, 16), [5, 0, 18])
    assert out["image"].shape == (3, 3, 16, 16)
    assert out["image"].dtype == torch.float32
    assert out["image"].is_contiguous(memory_format=torch.channels_last)
    assert out["image"][:, 0, 0, 0].tolist() == [pixel(5), pixel(0), pixel(18)]
    assert out["caption"] == ["picture 5", "picture 0", "picture 18"]
    assert out["attributes"] == [{"number": 5}, {"number": 0}, {"number": 18}]
    assert out["key"] == ["x-000000/000005", "x-000000/000000", "x-000002/000018"]
    assert out["sample_id"].tolist() == [5, 0, 18]
    assert out["sample_id"].dtype == out["epoch"].dtype == torch.int64


def test_range_is_minus_one_to_one(make_shards, make_sample):
    index = build_index(make_shards([make_sample(0)]))
    out = batch(Reader(index, 16), [0])["image"]
    assert out.unique().tolist() == [-1.0]


@pytest.mark.parametrize("num_cached", [0, 8, 20])
def test_bad_samples_are_replaced_by_the_next_good_one(index, num_cached):
    reader = Reader(index, 16, num_cached, max_bad_fraction=1)
    shown = {3: 5, 4: 5, 9: 10, 11: 13, 12: 13, 19: 0}
    expected = [shown.get(number, number) for number in range(20)]
    for _ in range(2):
        out = batch(reader, range(20))
        assert out["caption"] == [f"picture {number}" for number in expected]
        assert out["attributes"] == [{"number": number} for number in expected]
        assert out["image"][:, 0, 0, 0].tolist() == [pixel(number) for number in expected]
        assert out["sample_id"].tolist() == list(range(20))
    assert reader.shown().tolist() == expected
    assert reader.accounting() == {
        "read": 40,
        "replaced": 12,
        "replaced/not_an_image": 4,
        "replaced/caption_too_large": 2,
        "replaced/caption_not_utf8": 2,
        "replaced/bad_json": 4,
    }


def test_replacement_does_not_depend_on_what_was_read_before(index):
    order = np.random.default_rng(0).permutation(20)
    reader = Reader(index, 16, max_bad_fraction=1)
    for number in order:
        alone = batch(Reader(index, 16, max_bad_fraction=1), [number])
        assert batch(reader, [number])["key"] == alone["key"]


def test_cached_batch_reads_nothing(index):
    reader = Reader(index, 16, num_cached=20)
    first = batch(reader, range(20))
    for shard in index.shards:
        shard.write_bytes(b"")
    second = batch(reader, range(20))
    assert torch.equal(first["image"], second["image"])
    assert first["caption"] == second["caption"]


def test_bit_flip_after_indexing_is_caught(index):
    row = 6
    with index.shards[0].open("r+b") as file:
        for kind, sample in ((0, row), (1, row - 1)):  # one picture, another one's caption
            file.seek(index.offset[sample, kind] + index.size[sample, kind] // 2)
            byte = file.read(1)
            file.seek(-1, 1)
            file.write(bytes([byte[0] ^ 4]))
    reader = Reader(index, 16, max_bad_fraction=1)
    assert batch(reader, [5, 6, 7])["caption"] == ["picture 7"] * 3
    assert reader.accounting()["replaced/crc_mismatch"] == 2


def test_missing_members(make_shards, make_sample):
    index = build_index(make_shards([make_sample(0, txt=None, json=None), make_sample(1, txt=b" ")]))
    out = batch(Reader(index, 16), [0, 1])
    assert out["caption"] == ["", ""]
    assert out["attributes"] == [None, {"number": 1}]


def test_too_many_bad_samples_end_the_run(make_shards, make_sample):
    samples = [make_sample(number, **({"png": b"no"} if number in (17, 28, 29) else {})) for number in range(30)]
    shards = make_shards(samples, per_shard=10)
    reader = Reader(build_index(shards), 16, 30, max_bad_fraction=0.09)
    message = r"102 of the last 1020 .* not_an_image 3; most of them in .*x-000002\.tar.*max_bad"
    with pytest.raises(ConfigError, match=message):
        [batch(reader, range(30)) for _ in range(40)]
    patient = Reader(build_index(shards), 16, 30, max_bad_fraction=0.1)
    for _ in range(100):
        batch(patient, range(30))


def test_nothing_readable(make_shards, make_sample):
    shards = make_shards([make_sample(number, png=b"no") for number in range(5)])
    with pytest.raises(ConfigError, match=r"none of 5 samples.*not_an_image 5.*x-000000\.tar"):
        batch(Reader(build_index(shards), 16), [2])


def test_texts_keep_caption_and_attributes_together(index):
    texts = Reader(index, 16).texts()
    assert [caption for caption, _ in texts] == [f"picture {attributes['number']}" for _, attributes in texts]
    assert [texts[place][1]["number"] for place in (3, 4, 9, 11, 12, 19)] == [3, 5, 10, 13, 13, 19]


@pytest.mark.parametrize("known", [True, False])
def test_latents_stand_in_place_of_images(index, known):
    first = Reader(index, 16, max_bad_fraction=1)
    made_of = batch(first, range(20))
    latents = made_of["image"][:, :2, None, ::8, ::8].half()  # (N, 2, 1, 2, 2)
    reader = Reader(index, 16, max_bad_fraction=1)
    reader.attach_latents(latents, first.shown() if known else None)
    out = batch(reader, [3, 19, 7])
    assert "image" not in out
    assert out["latent"].dtype == torch.float16
    assert torch.equal(out["latent"], latents[[3, 19, 7]])
    assert (
        out["caption"] == [made_of["caption"][place] for place in (3, 19, 7)] == ["picture 5", "picture 0", "picture 7"]
    )
    assert reader.accounting()["replaced"] == 2
    assert torch.equal(batch(reader, [3, 19, 7], as_images=True)["image"], made_of["image"][[3, 19, 7]])


def test_latents_decode_nothing(index, monkeypatch):
    reader = Reader(index, 16)
    latents, shown = torch.zeros(20, 2, 4, 2, 2, dtype=torch.float16), Reader(index, 16).shown()
    monkeypatch.setattr("sdtrain.data.reader.decode_image", None)
    reader.attach_latents(latents, shown)
    assert batch(reader, range(20))["latent"].shape == (20, 2, 4, 2, 2)


def test_latents_of_other_shards_are_refused(index):
    with pytest.raises(ConfigError, match="19 latents for 20 samples"):
        Reader(index, 16).attach_latents(torch.zeros(19, 2, 4, 2, 2))


def test_more_shards_than_may_be_open(make_shards, monkeypatch):
    monkeypatch.setattr("sdtrain.data.reader._MAX_OPEN_SHARDS", 3)
    reader = Reader(build_index(make_shards(20, per_shard=2)), 16)
    ids = np.random.default_rng(0).permutation(20)
    assert batch(reader, ids)["caption"] == [f"picture {number}" for number in ids]
    assert len(reader._shards) == 3
