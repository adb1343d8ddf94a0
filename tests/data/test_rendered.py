"""The embedded data sets: written once, read back as shards, splits apart, and one that cannot be written."""

import io
import json
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import webdataset
from PIL import Image

from sdtrain.data import rendered
from sdtrain.data.lettering import HELD_OUT, Words
from sdtrain.data.rendered import RenderedDataModule
from sdtrain.data.scene import Shapes
from sdtrain.data.shard_writer import write_shards
from sdtrain.errors import ConfigError

SIZES = {"num_train": 48, "num_val": 12, "num_held_out": 8}


@pytest.fixture(scope="module")
def make(tmp_path_factory):
    def written(pictures):
        module = RenderedDataModule(str(tmp_path_factory.mktemp(pictures.name)), pictures, **SIZES)
        module.prepare_data()
        module.setup()
        return module

    return written


@pytest.fixture(scope="module")
def data(make):
    return make(Words())


@pytest.mark.parametrize("pictures", [Shapes(), Words()], ids=["shapes", "words"])
def test_pictures_and_captions_are_read_back_as_they_were_drawn(pictures, make):
    data = make(pictures)
    assert data.splits == {"train": 48, "val": 12, "held_out": 8}
    for split, which in (("train", ("mixed", 0, 48)), ("val", ("mixed", 1, 12)), ("held_out", ("held_out", 0, 8))):
        shown, told = zip(*pictures.draw(*which))
        batch = data.load(split, range(len(shown)))
        pixels = ((batch["image"].permute(0, 2, 3, 1).numpy() + 1) * 127.5).round().astype(np.uint8)
        assert (pixels == pictures.render(shown)).all()
        assert batch["caption"] == list(told) == data.captions(split)
        assert data.attributes(split) == [json.loads(json.dumps(picture.attributes())) for picture in shown]


def test_the_splits_are_apart(data):
    seen = ("train", "val")
    assert {found["things"][0]["text"] for found in data.attributes("held_out")} <= set(HELD_OUT)
    told = {split: {word["text"] for found in data.attributes(split) for word in found["things"]} for split in seen}
    assert not told["train"] & set(HELD_OUT)
    assert not told["val"] & set(HELD_OUT)
    assert not set(data.captions("train")) & set(data.captions("val"))


def test_they_are_shards_that_webdataset_reads(data):
    found = list(webdataset.WebDataset(str(data.folder / "train-00000.tar"), shardshuffle=False))
    assert len(found) == 48
    assert set(found[0]) >= {"__key__", "png", "txt", "json"}
    assert found[0]["__key__"] == "train_000000"
    assert Image.open(io.BytesIO(found[0]["png"])).size == (64, 64)


def test_it_is_written_once_and_a_cut_off_attempt_again(data, monkeypatch):
    before = {path.name: path.stat().st_mtime_ns for path in data.folder.glob("*.tar")}
    data.prepare_data()
    assert {path.name: path.stat().st_mtime_ns for path in data.folder.glob("*.tar")} == before
    (data.folder / "lock").unlink()
    data.prepare_data()
    assert not (data.folder / "lock").exists()  # what is complete is only read
    content = {path.name: path.read_bytes() for path in data.folder.glob("*.tar")}
    (data.folder / "COMPLETE").unlink()
    (data.folder / "train-00000.tar").write_bytes(b"half of it")
    data.prepare_data()
    assert {path.name: path.read_bytes() for path in data.folder.glob("*.tar")} == content
    assert (data.folder / "COMPLETE").exists()


def test_of_several_processes_one_writes_it(tmp_path, data, monkeypatch):
    """Threads here: a lock on another opening of the file holds them up as it does processes."""
    written = []
    monkeypatch.setattr(rendered, "write_shards", lambda *given: (written.append(given[1].name), write_shards(*given)))
    modules = [RenderedDataModule(str(tmp_path), Words(), **SIZES) for _ in range(3)]
    with ThreadPoolExecutor(3) as pool:
        list(pool.map(RenderedDataModule.prepare_data, modules))
    assert written == ["train-%05d.tar", "val-%05d.tar", "held_out-%05d.tar"]
    assert [module.fingerprint for module in modules] == [data.fingerprint] * 3


def test_another_seed_is_another_folder(tmp_path):
    first, second = (RenderedDataModule(str(tmp_path), Words(), seed, **SIZES) for seed in (0, 1))
    assert first.folder.name == "words-v1-0-48-12-8"
    assert second.folder != first.folder


def test_a_place_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match="data.root: cannot write the pictures to .*file.*; set data.root=DIR"):
        RenderedDataModule(str(tmp_path / "file"), Words(), **SIZES).prepare_data()


def test_no_pictures_to_train_on_are_refused_before_a_folder_is_made(tmp_path):
    with pytest.raises(ConfigError, match="num_train=0 num_val=12"):
        RenderedDataModule(str(tmp_path), Words(), **SIZES | {"num_train": 0})
    assert not any(tmp_path.iterdir())


def test_more_pictures_than_are_rendered_at_once(tmp_path):
    module = RenderedDataModule(str(tmp_path), Words(), num_train=501, num_val=1, num_held_out=1)
    module.prepare_data()
    assert module.splits == {"train": 501, "val": 1, "held_out": 1}
    assert module.load("train", [500])["key"] == ["train-00000/train_000500"]
