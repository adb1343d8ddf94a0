"""The index over all shards: what it finds, how it is cut and joined, and that its fingerprint goes with the data."""

import pickle
from pathlib import Path

import numpy as np
import pytest

from sdtrain.data.index import Index, build_index, find_shards
from sdtrain.data.layout import CAPTION, IMAGE, JSON
from sdtrain.errors import ConfigError


def read(index, row, kind):
    data = Path(index.shards[index.shard[row]].address).read_bytes()
    return data[index.offset[row, kind] :][: index.size[row, kind]]


def rows(index):
    return [(index.name(row), read(index, row, IMAGE), index.columns["number"][row]) for row in range(len(index))]


def test_finds_every_member(make_shards, make_sample):
    shards = make_shards(25, per_shard=10)
    index = build_index(shards)
    assert len(shards) == 3
    assert len(index) == 25
    for row in range(25):
        expected = make_sample(row)
        assert index.key[row].decode() == expected["__key__"]
        assert read(index, row, IMAGE) == expected["png"]
        assert read(index, row, CAPTION) == expected["txt"]
        assert read(index, row, JSON) == expected["json"]
        assert tuple(index.side[row]) == (16, 16)
    assert index.columns["number"].tolist() == list(range(25))
    assert index.name(12) == "x-000001/000012"
    assert index.losses == ()
    assert {getattr(index, name).dtype for name in ("offset", "size")} == {np.dtype(np.int64)}
    assert (index.shard.dtype, index.crc.dtype, index.side.dtype) == (np.int32, np.uint32, np.int32)


@pytest.mark.parametrize("data", [b"x", b"not a tar " * 1000, b"\x1f\x8b\x08" + b"\1" * 5000])
def test_no_tar_at_all(tmp_path, data):
    path = tmp_path / "a.tar"
    path.write_bytes(data)
    with pytest.raises(ConfigError, match=r"a\.tar is not a tar shard"):
        build_index([path])


def test_fingerprint_goes_with_the_data(tmp_path, make_shards, make_sample):
    first = build_index(make_shards(5)).fingerprint
    (tmp_path / "shards").rename(tmp_path / "moved")
    moved = find_shards(tmp_path / "moved")
    assert build_index(moved).fingerprint == first
    other = build_index(make_shards([make_sample(number, png=make_sample(number + 1)["png"]) for number in range(5)]))
    assert other.fingerprint != first


def test_subset(make_shards):
    index = build_index(make_shards(20, per_shard=7))
    whole = rows(index)
    picks = {
        "some": np.array([3, 1, 19]),
        "neighbours": np.arange(5, 15),
        "slice": slice(5, 15),
        "mask": np.arange(20) % 3 == 0,
        "none": np.array([], np.int64),
        "steps": slice(0, 20, 7),
        "last": np.array([-1]),
    }
    subsets = {name: index.subset(pick) for name, pick in picks.items()}
    for name, pick in picks.items():
        assert rows(subsets[name]) == [whole[row] for row in np.arange(20)[pick]]
    assert subsets["slice"].fingerprint == subsets["neighbours"].fingerprint
    assert subsets["slice"].offset.base is not None  # a view, no copy
    assert subsets["neighbours"].offset.base is not None
    assert len({subset.fingerprint for subset in subsets.values()} | {index.fingerprint}) == len(picks)
    assert index.subset(np.arange(20)) is index
    assert subsets["slice"].subset(slice(0, 3)).fingerprint != index.subset(slice(0, 3)).fingerprint


def test_concat(make_shards, make_sample):
    first, second = (build_index(make_shards(12, per_shard=5, name=name)) for name in "ab")
    odd = build_index(make_shards([make_sample(7, json=b'{"language": "en", "number": 7}')], name="c"))
    index = Index.concat([first, second.subset(np.array([11, 2])), odd])
    assert rows(index) == [*rows(first), rows(second)[11], rows(second)[2], *rows(odd)]
    assert index.columns["language"].tolist() == [b""] * 14 + [b"en"]
    assert index.shard.dtype == np.int32
    assert Index.concat([first]) is first
    assert Index.concat([first, second]).fingerprint != Index.concat([second, first]).fingerprint


def test_an_index_travels(make_shards):
    index = build_index(make_shards(12, per_shard=5)).subset(np.array([1, 7]))
    there = pickle.loads(pickle.dumps(index))
    assert rows(there) == rows(index)
    assert (there.fingerprint, there.shards, there.losses) == (index.fingerprint, index.shards, index.losses)


def test_find_shards(tmp_path, make_shards, monkeypatch):
    shards = [str(shard) for shard in make_shards(30, per_shard=10)]
    build_index(shards)
    folder = tmp_path / "shards"
    assert find_shards(folder) == find_shards(str(folder / "*.tar")) == find_shards([shards[0], str(folder)]) == shards
    monkeypatch.chdir(tmp_path)
    assert find_shards("shards/x-00000[01].tar") == find_shards("shards/x-{000000..000001}.tar") == shards[:2]
    with pytest.raises(ConfigError, match=r"no shard matches 'shards/x-000003\.tar'"):
        find_shards("shards/x-{000000..000003}.tar")


def test_remote_shards_have_numbers():
    found = find_shards(["https://host/a/{008..011}.tar", "s3://bucket/{0..1}/x-{00..01}.tar?v=1"])
    assert found[:4] == [f"https://host/a/{number:03d}.tar" for number in range(8, 12)]
    assert found[4:] == [f"s3://bucket/{one}/x-{two:02d}.tar?v=1" for one in range(2) for two in range(2)]
    with pytest.raises(ConfigError, match=r"https://host/a\.tar is not indexed; `python tools/index_shards\.py"):
        build_index(["https://host/a.tar"])


@pytest.mark.parametrize("pattern", ["nothing/*.tar", "absent.tar", "pipe:cat x.tar", ".", [], "ftp://a/b.tar"])
def test_no_shard_says_what_to_do(tmp_path, monkeypatch, pattern):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError, match=r"^data\.shards: .*\.tar"):
        find_shards(pattern)


def test_metadata_services_are_no_shards():
    with pytest.raises(ConfigError, match="metadata service"):
        find_shards("http://169.254.169.254/latest/x.tar")
