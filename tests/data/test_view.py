"""Pictures that go with a picture: from shards, with an index and without, cut and mirrored exactly as it is."""

import io
import json

import numpy as np
import pytest
import torch
from PIL import Image

from sdtrain.data.datamodule import ShardDataModule
from sdtrain.data.index import build_index
from sdtrain.data.manifest import write_folder
from sdtrain.data.reader import Reader
from sdtrain.data.sequential import SequentialDataModule
from sdtrain.data.shard_index import index_shard
from sdtrain.data.verify import verify_folder
from sdtrain.errors import ConfigError

SIDES = (96, 72)  # width and height


def noise(number):
    return np.random.default_rng(number).integers(0, 256, (SIDES[1] // 8, SIDES[0] // 8, 3), np.uint8)


def encoded(pixels, kind="PNG", **options):
    """Blocks of 8 pixels, so that a shift of one shows."""
    file = io.BytesIO()
    Image.fromarray(np.kron(pixels, np.ones((8, 8, 1), np.uint8))).save(file, kind, **options)
    return file.getvalue()


def with_companions(number, kind="PNG"):
    """A picture whose source is its negative, and whose mask is white where it is bright."""
    pixels = noise(number)
    bright = np.repeat((pixels[..., :1] > 127) * np.uint8(255), 3, axis=2)
    return {
        "__key__": f"{number:06d}",
        "jpg" if kind == "JPEG" else "png": encoded(pixels, kind, **({"quality": 98} if kind == "JPEG" else {})),
        "mask.png": encoded(bright),
        "source.png": encoded(255 - pixels),
        "txt": f"picture {number}".encode(),
        "json": json.dumps({"number": number}).encode(),
    }


def batch_of(shards, names=("mask", "source"), num=8, **options):
    reader = Reader(build_index(shards), 24, **options)
    reader.accompany(names)
    return reader.batch(np.arange(num), np.zeros(num, np.int64))


@pytest.mark.parametrize("kind", ["PNG", "JPEG"])
@pytest.mark.parametrize("options", [{}, {"crop": "random", "flip": True}], ids=["centre", "random"])
def test_they_are_cut_as_the_picture_is(make_shards, kind, options):
    shards = make_shards([with_companions(number, kind) for number in range(8)])
    batch = batch_of(shards, **options)
    assert batch["mask"].shape == (8, 1, 24, 24)
    assert batch["source"].shape == batch["image"].shape == (8, 3, 24, 24)
    far = 0.02 if kind == "PNG" else 0.2
    assert (batch["image"] + batch["source"]).abs().max() < far
    if kind == "PNG":
        alone = Reader(build_index(shards), 24, **options).batch(np.arange(8), np.zeros(8, np.int64))
        assert torch.equal(batch["image"], alone["image"])
    inside = (batch["mask"] < 0.02) | (batch["mask"] > 0.98)  # elsewhere the filter mixes neighbours
    bright = batch["image"][:, :1] > 0
    assert ((batch["mask"] > 0.5) == bright)[inside].float().mean() > 0.97
    assert 0 <= batch["mask"].min() < 0.1 < 0.9 < batch["mask"].max() <= 1


def test_a_large_jpeg_is_not_decoded_smaller_than_its_mask(make_shards):
    """At half the size a crop starts at every second pixel only."""
    rng = np.random.default_rng(0)
    pixels = np.kron(rng.integers(0, 2, (60, 80, 1), np.uint8) * 255, np.ones((10, 10, 3), np.uint8))
    sample = with_companions(0)
    files = {}
    for name, kind in (("jpg", "JPEG"), ("mask.png", "PNG")):
        files[name] = io.BytesIO()
        Image.fromarray(pixels).save(files[name], kind, **({"quality": 98} if kind == "JPEG" else {}))
    shards = make_shards(
        [
            {"__key__": f"{i}", "txt": sample["txt"], **{name: file.getvalue() for name, file in files.items()}}
            for i in range(8)
        ]
    )
    reader = Reader(build_index(shards), 128, crop="random", flip=True)
    reader.accompany(["mask"])
    batch = reader.batch(np.arange(8), np.zeros(8, np.int64))
    assert (batch["mask"] * 2 - 1 - batch["image"][:, :1]).abs().mean() < 0.02


def test_only_what_is_asked_for_is_read(make_shards):
    shards = make_shards([with_companions(number) for number in range(8)])
    assert not {"mask", "source"} & batch_of(shards, names=()).keys()
    assert {"mask", "source"} & batch_of(shards, names=("caption", "image", "mask")).keys() == {"mask"}


def test_a_sample_without_a_mask_says_so_and_one_without_a_source_is_replaced(make_shards):
    samples = [with_companions(number) for number in range(4)]
    del samples[1]["mask.png"], samples[2]["source.png"]
    samples[1]["json"] = b'{"mask_offset": 0, "mask_size": 9, "mask_crc": 1}'  # a stranger's, which says nothing
    shards = make_shards(samples)
    batch = batch_of(shards, num=4)
    assert [bool((mask < 0).all()) for mask in batch["mask"]] == [False, True, False, False]
    assert batch["key"][2].endswith("000003")
    assert batch_of(shards, names=["mask"], num=4)["key"][2].endswith("000002")
    reader = Reader(build_index(shards), 24)
    reader.accompany(["source"])
    reader.batch(np.arange(4), np.zeros(4, np.int64))
    assert reader.accounting()["replaced/no_source"] == 1


def test_one_of_another_size_is_replaced(make_shards):
    samples = [with_companions(number) for number in range(3)]
    samples[0]["mask.png"] = encoded(noise(0)[1:])
    batch = batch_of(make_shards(samples), num=3)
    assert batch["key"][0].endswith("000001")


def test_an_index_folder_and_its_subsets_know_them(make_shards, make_sample, tmp_path):
    shards = [str(path) for path in make_shards([with_companions(number) for number in range(6)], name="a")]
    shards += [str(path) for path in make_shards([make_sample(number) for number in range(6)], name="b")]
    folder = tmp_path / "index"
    folder.mkdir()
    write_folder(folder, shards, index_shard)
    assert verify_folder(folder, 1) == []
    plain, mapped = build_index(shards), build_index([folder])
    assert plain.fingerprint == mapped.fingerprint
    some = mapped.subset(np.array([1, 4, 7]))
    expected = batch_of(shards[:1], names=["mask"], num=6)["mask"]
    for index in (some, some.gathered()):
        reader = Reader(index, 24)
        reader.accompany(["mask"])
        mask = reader.batch(np.arange(3), np.zeros(3, np.int64))["mask"]
        assert torch.equal(mask[:2], expected[[1, 4]])
        assert (mask[2] == -1).all()


def test_another_mask_is_other_data(make_shards, tmp_path):
    samples = [with_companions(number) for number in range(2)]
    first = build_index(make_shards(samples)).fingerprint
    for sample in samples:
        sample["mask.png"] = sample["mask.png"][:-1] + b"\0"  # as many bytes
    assert build_index(make_shards(samples)).fingerprint != first


def test_shards_in_sequence(make_shards):
    samples = [with_companions(number) for number in range(8)]
    del samples[3]["mask.png"]
    data = SequentialDataModule(str(make_shards(samples)[0]), image_size=24)
    data.connect(0, 4)
    assert "mask" not in data.load("val", range(8))  # what was read by then is read again
    data.accompany(["mask", "source"])
    batch = data.load("val", range(8))
    indexed = batch_of(make_shards(samples, name="y"))
    assert torch.equal(batch["mask"], indexed["mask"])
    assert torch.equal(batch["source"], indexed["source"])


def test_a_sample_whose_mask_is_broken_is_kept_until_masks_are_read(make_shards):
    """Guard: what was held before is read again."""
    samples = [with_companions(number) for number in range(8)]
    samples[2]["mask.png"] = b"no picture"
    data = SequentialDataModule(str(make_shards(samples)[0]), image_size=24)
    data.connect(0, 4)
    assert data.splits["val"] == 8
    data.accompany(["mask"])
    assert data.splits["val"] == 7
    assert len(data.load("val", range(7))["key"]) == 7


def test_a_run_without_any_says_what_is_missing(make_shards, capsys):
    data = ShardDataModule(str(make_shards(8)[0]), val=0.25, image_size=16)
    data.accompany(["caption", "mask"])
    assert (
        "data: no sample of train has a mask, such as x.mask.png beside x.png; masks are drawn"
        in capsys.readouterr().out
    )
    with pytest.raises(ConfigError, match="data: no sample of train has a source, such as x.source.png beside x.png"):
        data.accompany(["source"])
