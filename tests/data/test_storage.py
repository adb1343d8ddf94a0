"""Bytes of shards: local, over http, through the cache, always the same; what changed or broke is said."""

import dataclasses
import io
import os
import pickle
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from sdtrain.data.bad_sample import BadSample
from sdtrain.data.index import build_index
from sdtrain.data.members import Members
from sdtrain.data.reader import Reader
from sdtrain.data.retry import Retry
from sdtrain.data.shard_index import Shard
from sdtrain.data.storage import Storage
from sdtrain.errors import ConfigError

QUICK = Retry(num_tries=3, first_wait_seconds=0.001, max_wait_seconds=0.002)
PART = 1000


def stored(cache=None, **options):
    return Storage(cache, 1 << 20, QUICK, timeout_seconds=20.0, part_bytes=PART, **options)


@pytest.fixture
def index(make_shards):
    return build_index(make_shards(20, per_shard=7))


@pytest.fixture
def remote(index, server):
    """The same samples, at the server."""
    shards = [Shard(f"{server.url}/shards/{Path(shard.address).name}", shard.num_bytes, "v1") for shard in index.shards]
    return dataclasses.replace(index, shards=tuple(shards), origin=None)


def members(index, storage, samples=range(20), kinds=(1, 2, 0)):
    read = Members(index, storage).read(list(samples), kinds)
    return [row if isinstance(row, BadSample) else [None if one is None else bytes(one) for one in row] for row in read]


def all_of(index):
    data = {shard.address: Path(shard.address).read_bytes() for shard in index.shards}
    return [
        [
            data[index.shards[index.shard[row]].address][index.offset[row, kind] :][: index.size[row, kind]]
            for kind in (1, 2, 0)
        ]
        for row in range(len(index))
    ]


def test_local_members(index):
    assert members(index, stored()) == all_of(index)


def test_one_read_takes_a_sample(index, monkeypatch):
    calls = []
    pread = os.pread
    monkeypatch.setattr(os, "pread", lambda *arguments: calls.append(arguments) or pread(*arguments))
    members(index, stored(), range(5))
    assert len(calls) == 5
    calls.clear()
    members(index, stored(), range(5), kinds=(1,))
    assert [size for _, size, _ in calls] == index.size[:5, 1].tolist()


def test_members_far_apart_are_read_alone(write_tar, make_sample, monkeypatch):
    noise = np.random.default_rng(0).integers(0, 255, (100, 100, 3), np.uint8)
    Image.fromarray(noise).save(buffer := io.BytesIO(), "PNG")
    given = [("a.txt", b"told"), ("a.png", buffer.getvalue()), ("a.json", b"{}")]
    index = build_index([write_tar(given)])
    calls, pread = [], os.pread
    monkeypatch.setattr(os, "pread", lambda *arguments: calls.append(arguments) or pread(*arguments))
    assert members(index, stored(), [0], kinds=(1, 2)) == [[b"told", b"{}"]]
    assert [size for _, size, _ in calls] == [4, 2]
    assert members(index, stored(), [0], kinds=(1, 2, 0)) == [[b"told", b"{}", buffer.getvalue()]]
    assert len(calls) == 3


@pytest.mark.parametrize("is_cached", [False, True])
def test_over_http_it_is_the_same(index, remote, tmp_path, is_cached):
    storage = stored(tmp_path / "cache" if is_cached else None)
    for _ in range(2):
        assert members(remote, storage, [3, 17, 3, *range(20)]) == [all_of(index)[n] for n in (3, 17, 3, *range(20))]
    assert bool(storage.counts["cache_hits"]) == is_cached


def test_batches_over_http_are_the_same(index, remote, tmp_path):
    ids = np.random.default_rng(0).permutation(20)
    here, there = (
        Reader(which, 16, storage=storage).batch(ids, ids * 0)
        for which, storage in ((index, None), (remote, stored(tmp_path / "cache")))
    )
    assert (here["image"] == there["image"]).all()
    assert here["caption"] == there["caption"]
    assert here["key"] == there["key"]


def test_what_is_cached_is_not_asked_for(remote, server, tmp_path):
    first = members(remote, stored(tmp_path / "cache"))
    asked = len(server.asked)
    assert asked == len(set(server.asked))
    storage = stored(tmp_path / "cache")
    server.behaviour = [503] * 100
    assert members(remote, storage) == first
    assert len(server.asked) == asked
    assert storage.counts["fetched_bytes"] == 0
    assert storage.counts["read_bytes"] > 0


def test_two_sources_with_a_name_in_common(make_shards, make_sample, server, tmp_path):
    found = []
    for source in ("laion", "coyo"):
        path = make_shards([make_sample(0, txt=source.encode())])[0]
        (tmp_path / source).mkdir()
        path.rename(tmp_path / source / "00000.tar")
        local = build_index([tmp_path / source / "00000.tar"])
        shard = Shard(f"{server.url}/{source}/00000.tar", local.shards[0].num_bytes, "v1")
        found.append(members(dataclasses.replace(local, shards=(shard,)), stored(tmp_path / "cache"), [0])[0][0])
    assert found == [b"laion", b"coyo"]


@pytest.mark.parametrize("is_cached", [False, True])
def test_server_that_lies_once_is_asked_again(index, remote, server, tmp_path, is_cached):
    server.behaviour = ["garbage"]
    assert members(remote, stored(tmp_path / "cache" if is_cached else None), [4]) == [all_of(index)[4]]


def test_server_that_always_lies_has_bad_samples(remote, server):
    server.behaviour = ["garbage"] * 100
    storage = stored()
    (bad,) = members(remote, storage, [4])
    assert bad.reason == "crc_mismatch"
    assert len(server.asked) <= 3 * QUICK.num_tries + 2


def test_cache_that_rotted_is_fetched_again(index, remote, tmp_path):
    cache = tmp_path / "cache"
    members(remote, stored(cache))
    for part in cache.glob("*.*"):
        part.write_bytes(bytes(part.stat().st_size))
    for _ in range(3):
        storage = stored(cache)
        assert members(remote, storage) == all_of(index)
    assert storage.counts["fetched_bytes"] == 0


def test_server_that_is_gone_ends_the_run(remote, server):
    server.behaviour = [503] * 100
    with pytest.raises(ConfigError, match=r"x-000000\.tar: the server answers 503 .*tried 3 times"):
        members(remote, stored(), [0])


def test_local_shard_that_changed(index):
    path = Path(index.shards[0].address)
    os.utime(path, ns=(1, 1))
    with pytest.raises(ConfigError, match=rf"^data: shard_changed: {path} changed after it was indexed"):
        members(index, stored(), [0])
    unknown = dataclasses.replace(index, shards=tuple(shard._replace(version="") for shard in index.shards))
    assert members(unknown, stored()) == all_of(index)
    with path.open("ab") as file:
        file.write(b"x")
    with pytest.raises(ConfigError, match="shard_changed"):
        members(unknown, stored(), [0])


def test_local_shard_that_shrinks_while_it_is_open(index):
    storage = stored()
    members(index, storage, [0, 6])
    os.truncate(index.shards[0].address, 3000)
    with pytest.raises(ConfigError, match=r"shard_changed: .*is shorter"):
        members(index, storage, [6])


def test_local_shard_that_is_gone_is_not_awaited(index, monkeypatch):
    monkeypatch.setattr("time.sleep", None)
    Path(index.shards[0].address).unlink()
    with pytest.raises(ConfigError, match=r"^data: .*x-000000\.tar: No such file"):
        members(index, stored(), [0])


@pytest.mark.parametrize("num_failures", [2, 9])
def test_disk_that_is_away_for_a_moment(index, monkeypatch, num_failures):
    failures, pread = [OSError(116, "Stale file handle")] * num_failures, os.pread

    def read(*arguments):
        if failures:
            raise failures.pop()
        return pread(*arguments)

    monkeypatch.setattr(os, "pread", read)
    if num_failures < 3:
        assert members(index, stored(), [0]) == [all_of(index)[0]]
    else:
        with pytest.raises(ConfigError, match="Stale file handle"):
            members(index, stored(), [0])


def test_copies_have_descriptors_of_their_own(index, remote, tmp_path):
    storage = stored(tmp_path / "cache")
    members(index, storage), members(remote, storage)
    copy = pickle.loads(pickle.dumps(storage))
    assert not copy._files
    assert members(index, copy) == members(remote, copy) == all_of(index)
    storage.enter_worker()
    assert not storage._files
    assert members(index, storage) == all_of(index)


def test_cache_too_small_for_its_parts(tmp_path):
    with pytest.raises(ConfigError, match=r"^data\.reader\.storage\.cache_shard_bytes: 1000 .*cache_dir=null"):
        Storage(tmp_path, 1000)
