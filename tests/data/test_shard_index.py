"""A shard's index beside it: used while it is true, made again when it is not."""

import os

import numpy as np
import pytest

from sdtrain.data.index import build_index
from sdtrain.data.layout import ABSENT
from sdtrain.data.shard_index import digest_rows, index_path, index_shard
from sdtrain.data.shard_walk import ARRAYS


@pytest.fixture
def no_walk(monkeypatch):
    return lambda: monkeypatch.setattr("sdtrain.data.shard_index.walk_shard", None)  # walking again would fail


def test_saved_index_is_used_and_is_the_same(make_shards, make_sample, no_walk):
    shard = str(make_shards([make_sample(0), make_sample(1, txt=None, json=None), make_sample(2, json=b'{"a": 1}')])[0])
    first = index_shard(shard)
    assert index_path(shard).is_file()
    no_walk()
    second = index_shard(shard)
    for name in ARRAYS:
        assert np.array_equal(first.found.arrays[name], second.found.arrays[name])
    for name, column in first.found.columns.items():
        np.testing.assert_array_equal(column, second.found.columns[name])
    assert first.found.columns.keys() == second.found.columns.keys() == {"number", "a"}
    assert first.shard == second.shard == (shard, os.stat(shard).st_size, str(os.stat(shard).st_mtime_ns))
    assert first.found[2:] == second.found[2:]
    assert first.digest == second.digest == digest_rows(first.found.arrays, first.found.columns)
    assert first.found.losses
    assert first.found.arrays["size"][1].tolist()[1:] == [ABSENT, ABSENT]


def test_a_shard_that_changed_is_walked_again(make_shards, make_sample):
    path = make_shards(5)[0]
    before = index_shard(str(path))
    stat = path.stat()
    make_shards([make_sample(number, txt=b"another text") for number in range(5)])
    os.utime(path, ns=(stat.st_mtime_ns + 1, stat.st_mtime_ns + 1))
    after = index_shard(str(path))
    assert before.digest != after.digest
    assert before.found.sha256 != after.found.sha256


@pytest.mark.parametrize("damage", [b"", b"PK\x03\x04 no zip", None])
def test_damaged_index_is_made_again(make_shards, damage):
    path = make_shards(5)[0]
    first, saved = index_shard(str(path)), index_path(path)
    saved.write_bytes(saved.read_bytes()[:-100] if damage is None else damage)
    assert index_shard(str(path)).digest == first.digest


@pytest.mark.parametrize("name", ["offset", "size", "crc", "side", "key"])
def test_an_index_whose_rows_were_changed_is_made_again(make_shards, name):
    path = make_shards(5)[0]
    first = index_shard(str(path))
    with np.load(index_path(path)) as file:
        arrays = dict(file)
    arrays[name][2] = b"x" if name == "key" else 7
    with index_path(path).open("wb") as file:
        np.savez(file, **arrays)
    assert index_shard(str(path)).found.arrays[name].tolist() == first.found.arrays[name].tolist()


def test_a_folder_that_cannot_be_written(make_shards, monkeypatch, tmp_path, no_walk):
    path, replace = make_shards(5)[0], os.replace

    def refuse(source, target):
        if str(target).startswith(str(path.parent)):
            raise PermissionError
        replace(source, target)

    monkeypatch.setattr("os.replace", refuse)  # the tests may run as root, whom modes do not stop
    assert len(build_index([path])) == 5
    assert sorted(file.name for file in path.parent.iterdir()) == [path.name]
    (tmp_path / "parts").mkdir()
    index_shard(str(path), tmp_path / "parts")
    no_walk()
    assert len(index_shard(str(path), tmp_path / "parts").found.arrays["key"]) == 5


def test_a_check_that_was_made_is_not_forgotten(make_shards, make_sample, no_walk):
    shard = str(make_shards([make_sample(0), make_sample(1, png=b"x"), make_sample(2)])[0])
    assert len(index_shard(shard).found.arrays["key"]) == 3
    calls = []
    for _ in range(2):
        checked = index_shard(shard, check=lambda data: calls.append(data) or "")
        assert checked.found.arrays["key"].tolist() == [b"000000", b"000002"]
        assert len(calls) == 3
    no_walk()
    assert index_shard(shard).digest == checked.digest


def test_a_shard_that_is_written_meanwhile(make_shards, monkeypatch):
    path = make_shards(5)[0]

    def walk_and_write(*arguments):
        path.touch()
        return arguments

    monkeypatch.setattr("sdtrain.data.shard_index.walk_shard", walk_and_write)
    with pytest.raises(OSError, match=r"x-000000\.tar changed while it was read"):
        index_shard(str(path))


def test_names_of_addresses(make_shards):
    shard = index_shard(str(make_shards(1)[0])).shard
    assert (shard.name, shard.stem) == ("x-000000.tar", "x-000000")
    away = shard._replace(address="https://user:pw@host/a/b.c.tar?token=secret")
    assert (away.name, away.stem) == ("b.c.tar", "b.c")
