"""Batches by sample number: contents, randomness, replacement, budget, accounting, cache, latents."""

import io
import json
import os
import subprocess
import sys
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from sdtrain.data.accounting import Accounting
from sdtrain.data.caption import CaptionRule
from sdtrain.data.index import build_index
from sdtrain.data.reader import Reader
from sdtrain.errors import ConfigError

BAD = {
    3: {"png": b"<html>"},
    4: {"txt": b"x" * 1_000_000},
    9: {"txt": b"\xff\xfe\xfd\xfc"},
    11: {"json": b'{"a": }'},
    12: {"json": b"[" * 100_000},
    19: {"png": b""},  # the last one: its place goes to the first
}


@pytest.fixture
def index(make_shards, make_sample):
    return build_index(make_shards([make_sample(number, **BAD.get(number, {})) for number in range(20)], per_shard=7))


@pytest.fixture
def wide(make_shards, make_sample):
    """Pictures twice as wide as high, whose columns say where they were cut."""
    return build_index(make_shards([make_sample(number, png=ramp(32, 64)) for number in range(40)]))


def ramp(height, width):
    pixels = np.broadcast_to((np.arange(width) * 4)[None, :, None], (height, width, 3)).astype(np.uint8)
    Image.fromarray(pixels).save(buffer := io.BytesIO(), "PNG")
    return buffer.getvalue()


def batch(reader, ids, epoch=0, **options):
    return reader.batch(np.array(ids), np.full(len(ids), epoch), **options)


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


def test_sizes(wide):
    out = batch(Reader(wide, 16), [0, 1], size=(24, 16))
    assert out["image"].shape == (2, 3, 24, 16)
    assert out["original_size"].tolist() == [[32, 64]] * 2
    assert out["target_size"].tolist() == [[24, 16]] * 2
    assert out["crop_top_left"].tolist() == [[0, 16]] * 2  # (48 - 16) / 2


def test_crop_and_flip_are_of_seed_epoch_and_sample(wide):
    def read(seed, ids, epoch, num_cached=40):
        reader = Reader(wide, 32, num_cached, crop="random", flip=True)
        reader.connect(seed)
        if num_cached:
            batch(reader, ids, epoch + 1)  # of which nothing may be kept
        return batch(reader, ids, epoch)

    whole = read(7, range(40), 3)
    left = whole["crop_top_left"][:, 1]
    is_flipped = whole["image"][:, 0, 0, 0] > whole["image"][:, 0, 0, -1]
    assert 8 < is_flipped.sum() < 32
    assert len(left.unique()) > 15
    shown = torch.where(is_flipped, 32 - left, left)  # where the cut begins in the picture as it is stored
    first = torch.where(is_flipped, whole["image"][:, 0, 0, -1], whole["image"][:, 0, 0, 0])
    assert torch.equal(first, (shown * 4).float() / 127.5 - 1)
    part = read(7, [31, 4], 3, num_cached=0)
    assert torch.equal(part["image"], whole["image"][[31, 4]])
    for other in (read(8, range(40), 3), read(7, range(40), 4)):
        assert not torch.equal(other["crop_top_left"], whole["crop_top_left"])


def test_captions_are_drawn_by_seed_epoch_and_sample(make_shards, make_sample):
    told = {"json": json.dumps({"other": ["b", "c"]}).encode(), "txt": b"a"}
    index = build_index(make_shards([make_sample(number, **told) for number in range(60)]))
    rule = CaptionRule(fields={"txt": 1.0, "json.other": 2.0})
    kept, fresh = (Reader(index, 16, num_cached, caption=rule) for num_cached in (60, 0))
    for _ in range(2):
        for epoch in range(2):
            captions = batch(kept, range(60), epoch)["caption"]
            assert captions == batch(fresh, range(60), epoch)["caption"]
            assert min(captions.count(one) for one in "abc") > 8
    assert batch(kept, range(60), 0)["caption"] != captions


def test_other_crops_are_refused(index):
    with pytest.raises(ConfigError, match=r"data.reader.crop='middle' is none of 'center', 'random'"):
        Reader(index, 16, crop="middle")


@pytest.mark.parametrize("num_cached", [0, 8, 20])
def test_bad_samples_are_replaced_by_the_next_good_one(index, num_cached):
    reader = Reader(index, 16, num_cached)
    shown = {3: 5, 4: 5, 9: 10, 11: 13, 12: 13, 19: 0}
    expected = [shown.get(number, number) for number in range(20)]
    for _ in range(2):
        out = batch(reader, range(20))
        assert out["caption"] == [f"picture {number}" for number in expected]
        assert out["attributes"] == [{"number": number} for number in expected]
        assert out["image"][:, 0, 0, 0].tolist() == [pixel(number) for number in expected]
        assert out["sample_id"].tolist() == list(range(20))
    assert reader.shown().tolist() == expected
    counts = reader.accounting()
    assert counts.pop("read_bytes") > 0
    assert counts == {
        "read": 40,
        "decoded": 40 - num_cached,
        "replaced": 12,
        "replaced/not_an_image": 4,
        "replaced/caption_too_large": 2,
        "replaced/caption_not_utf8": 2,
        "replaced/bad_json": 4,
        "replaced_in/shards/x-000001.tar": 6,
        "replaced_in/shards/x-000000.tar": 4,
        "replaced_in/shards/x-000002.tar": 2,
    }


@pytest.mark.parametrize("num_cached", [0, 8])
def test_what_is_counted_adds_up(index, num_cached):
    """Pictures that are decoded for no batch, to find out which are good, are no samples of one."""
    reader = Reader(index, 16, num_cached)
    reader.shown()
    assert reader.accounting()["read"] == reader.accounting().get("decoded", 0) == 0
    batch(reader, range(20))
    batch(reader, range(20), size=(8, 24))
    counts = reader.accounting()
    assert (counts["read"], counts["decoded"], counts["replaced"]) == (40, 40 - num_cached, 12)
    assert sum(count for name, count in counts.items() if name.startswith("replaced/")) == 12


def test_replacement_does_not_depend_on_what_was_read_before(index):
    order = np.random.default_rng(0).permutation(20)
    reader = Reader(index, 16)
    for number in order:
        alone = batch(Reader(index, 16), [number])
        assert batch(reader, [number])["key"] == alone["key"]


def test_same_bad_sample_twice_in_a_batch(index):
    out = batch(Reader(index, 16), [3, 3, 4, 3], size=(8, 24))
    assert out["caption"] == ["picture 5"] * 4
    assert out["image"].shape == (4, 3, 8, 24)


def test_cached_batch_reads_nothing(index):
    reader = Reader(index, 16, num_cached=20)
    first = batch(reader, range(20))
    for shard in index.shards:
        Path(shard.address).write_bytes(b"")
    second = batch(reader, range(20))
    assert torch.equal(first["image"], second["image"])
    assert first["caption"] == second["caption"]


def flip_bits(index, members):
    """A bit of each (sample, kind), on a disk that does not say so: the time of the last change is set back."""
    path = index.shards[0].address
    times = os.stat(path)
    with open(path, "r+b") as file:
        for sample, kind in members:
            place = index.offset[sample, kind] + index.size[sample, kind] // 2
            file.seek(place)
            byte = file.read(1)
            file.seek(place)
            file.write(bytes([byte[0] ^ 4]))
    os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))


def test_bit_flip_after_indexing_is_caught(index):
    flip_bits(index, [(6, 0), (5, 1)])  # one picture, another one's caption
    reader = Reader(index, 16)
    assert batch(reader, [5, 6, 7])["caption"] == ["picture 7"] * 3
    assert reader.accounting()["replaced/crc_mismatch"] == 2


def test_shard_that_changed_after_indexing_ends_the_run(index):
    path = Path(index.shards[0].address)
    path.write_bytes(path.read_bytes())
    with pytest.raises(ConfigError, match=r"^data: shard_changed: .*x-000000\.tar"):
        batch(Reader(index, 16), [0])


def test_missing_members(make_shards, make_sample):
    index = build_index(make_shards([make_sample(0, txt=None, json=None), make_sample(1, txt=b" ")]))
    out = batch(Reader(index, 16), [0, 1])
    assert out["caption"] == ["", ""]
    assert out["attributes"] == [None, {"number": 1}]


def test_too_many_bad_samples_end_the_run_and_name_their_record(make_shards, make_sample, tmp_path):
    is_bad = {number for number in range(400) if number % 5 == 0}
    samples = [make_sample(number, **({"png": b"no"} if number in is_bad else {})) for number in range(400)]
    index = build_index(make_shards(samples, per_shard=100))
    reader = Reader(index, 16)
    reader.connect(0, tmp_path / "quarantine", rank=3)
    record = tmp_path / "quarantine" / "rank3-main.jsonl"
    message = rf"33 of the last 193 .* not_an_image 33; most of them in .*x-000000\.tar; each is in {record}.*max_bad"
    with pytest.raises(ConfigError, match=message):
        batch(reader, range(400))
    rows = [json.loads(line) for line in record.read_text().splitlines()]
    assert [row["key"] for row in rows] == [f"{number:06d}" for number in sorted(is_bad)[:33]]
    assert rows[0].keys() == {"reason", "shard", "key", "offset", "exception"}
    batch(Reader(index, 16, max_bad_fraction=0.21), range(400))


def test_same_few_bad_samples_of_a_small_set_do_not_end_a_run(make_shards, make_sample):
    samples = [make_sample(number, **({"png": b"no"} if number < 3 else {})) for number in range(30)]
    reader = Reader(build_index(make_shards(samples)), 16)
    for epoch in range(50):
        batch(reader, range(30), epoch)
    assert reader.accounting()["replaced"] == 150


def test_nothing_readable(make_shards, make_sample):
    shards = make_shards([make_sample(number, png=b"no") for number in range(5)])
    with pytest.raises(ConfigError, match=r"none of 5 samples.*not_an_image 5.*x-000000\.tar"):
        batch(Reader(build_index(shards), 16), [2])


def test_a_hundred_bad_samples_in_a_row_end_the_run(make_shards, make_sample):
    samples = [make_sample(number, **({"png": b"no"} if number < 101 else {})) for number in range(102)]
    index = build_index(make_shards(samples))
    assert batch(Reader(index, 16, max_bad_fraction=1), [1])["caption"] == ["picture 101"]
    with pytest.raises(ConfigError, match=r"101 samples in a row could not be used: not_an_image 101"):
        batch(Reader(index, 16, max_bad_fraction=1), [0])


def test_bad_samples_with_good_ones_between_are_not_in_a_row(make_shards, make_sample):
    samples = [make_sample(number, **({"png": b"no"} if number % 2 else {})) for number in range(210)]
    reader = Reader(build_index(make_shards(samples)), 16, max_bad_fraction=1)
    assert batch(reader, range(210))["caption"][-1] == "picture 0"


def test_no_memory_is_no_bad_sample(index, monkeypatch):
    def decode(*arguments, **options):
        raise MemoryError

    monkeypatch.setattr("sdtrain.data.view.decode_image", decode)
    with pytest.raises(MemoryError):
        batch(Reader(index, 16), [0])


def test_texts_keep_caption_and_attributes_together(index):
    texts = Reader(index, 16).texts()
    assert [caption for caption, _ in texts] == [f"picture {attributes['number']}" for _, attributes in texts]
    assert [texts[place][1]["number"] for place in (3, 4, 9, 11, 12, 19)] == [3, 5, 10, 13, 13, 19]


@pytest.mark.parametrize("known", [True, False])
def test_latents_stand_in_place_of_images(index, known):
    first = Reader(index, 16)
    made_of = batch(first, range(20))
    latents = made_of["image"][:, :2, None, ::8, ::8].half()  # (N, 2, 1, 2, 2)
    reader = Reader(index, 16)
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


@pytest.mark.parametrize("num_cached", [0, 20])
def test_latents_of_what_was_just_read_decode_nothing(index, monkeypatch, num_cached):
    reader = Reader(index, 16, num_cached)
    batch(reader, range(20))
    monkeypatch.setattr("sdtrain.data.view.decode_image", None)
    reader.attach_latents(torch.zeros(20, 2, 4, 2, 2, dtype=torch.float16))
    assert batch(reader, range(20))["latent"].shape == (20, 2, 4, 2, 2)


def test_latents_of_other_shards_are_refused(index):
    with pytest.raises(ConfigError, match="19 latents for 20 samples"):
        Reader(index, 16).attach_latents(torch.zeros(19, 2, 4, 2, 2))


def test_more_shards_than_may_be_open(make_shards, monkeypatch):
    monkeypatch.setattr("sdtrain.data.storage._MAX_OPEN_FILES", 3)
    reader = Reader(build_index(make_shards(20, per_shard=2)), 16)
    ids = np.random.default_rng(0).permutation(20)
    assert batch(reader, ids)["caption"] == [f"picture {number}" for number in ids]
    assert len(reader._members.storage._files) == 3


def test_reader_of_many_samples_holds_a_byte_of_each(make_shards):
    index = build_index(make_shards(4))
    many = index.subset(np.tile(np.arange(4), 500_000))
    tracemalloc.start()
    try:
        reader = Reader(many, 16, num_workers=1)
        batch(reader, np.random.default_rng(0).integers(0, len(many), 8))
        assert tracemalloc.get_traced_memory()[1] < 1.5 * len(many)
        reader.enter_worker(0)
        assert tracemalloc.get_traced_memory()[0] < 0.5 * len(many)
    finally:
        tracemalloc.stop()


ATTACK = """
import sys
import numpy as np
from sdtrain.data.index import build_index
from sdtrain.data.reader import Reader
from sdtrain.ops.memory import peak_memory_bytes
index = build_index([sys.argv[1]])
reader = Reader(index, 16, max_bad_fraction=1)
reader.batch(np.array([0]), np.array([0]))
before = peak_memory_bytes()
out = reader.batch(np.arange(len(index)), np.zeros(len(index)))
after = peak_memory_bytes()
counts = reader.accounting()
print(after - before, out["caption"], sorted(k for k in counts if k.startswith("replaced/")), sep="|")
"""


@pytest.mark.slow
def test_attacks_do_not_swell(make_shards, make_sample):
    Image.new("L", (30000, 30000)).save(bomb := io.BytesIO(), "PNG")
    Image.new("L", (8000, 8001)).save(large := io.BytesIO(), "PNG")  # what a warning alone would let through
    attacks = [
        {"png": bomb.getvalue()},
        {"png": large.getvalue()},
        {"json": b'{"a":' * 20_000},
        {"json": b"[" * 200_000},
        {"json": b'{"a": ' + b"9" * 100_000 + b"}"},
        {"png": None, "jpg": b"<html><script>1</script></html>"},
        {"txt": b"nul \0 and \xe2\x80\xae turned"},
        {"txt": b"x" * 10_000_000},
    ]
    samples = [make_sample(0), *(make_sample(number, **attack) for number, attack in enumerate(attacks, 1))]
    shard = make_shards([*samples, make_sample(9)])[0]
    done = subprocess.run([sys.executable, "-c", ATTACK, shard], capture_output=True, text=True, timeout=60)
    grown, captions, reasons = done.stdout.strip().split("|")
    assert int(grown) < 200 * 2**20, grown
    assert captions == str(["picture 0", *["nul and turned"] * 7, *["picture 9"] * 2])
    assert reasons == str(
        [f"replaced/{reason}" for reason in ("bad_json", "caption_too_large", "not_an_image", "too_many_pixels")]
    )


def test_accounting_of_workers_is_in_shared_memory(index):
    mine = Accounting(index.shards, len(index), num_workers=1)
    forked = Accounting.__new__(Accounting)
    forked.__dict__.update(mine.__dict__)
    forked.enter_worker(0)
    forked.add("read_bytes", 5)
    forked.read(["a", ""])
    forked.replaced("too_small", 1)
    mine.read([""])
    assert mine.report() == {
        "read": 3,
        "empty_captions": 2,
        "read_bytes": 5,
        "replaced": 1,
        "replaced/too_small": 1,
        "replaced_in/shards/x-000001.tar": 1,
    }
