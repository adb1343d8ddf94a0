"""An index folder: the same index as beside the shards, mapped, and refused once it and the shards do not agree."""

import json
import os
import pickle
import shutil
import tarfile

import numpy as np
import pytest

from sdtrain.data.index import build_index, find_shards
from sdtrain.data.manifest import MANIFEST, REJECTED, write_folder
from sdtrain.data.shard_index import index_shard
from sdtrain.data.shard_walk import ARRAYS
from sdtrain.data.verify import verify_folder
from sdtrain.errors import ConfigError


@pytest.fixture
def shards(make_shards, make_sample):
    odd = {3: {"json": b'{"language": "en", "aesthetic": 5}'}, 4: {"txt": None}, 8: {"png": None}}
    return make_shards([make_sample(number, **odd.get(number, {})) for number in range(10)], per_shard=4)


@pytest.fixture
def make_folder(tmp_path, shards):
    def make(root=None, addresses=None):
        folder = tmp_path / "index"
        folder.mkdir(exist_ok=True)
        about = write_folder(folder, addresses or [str(shard) for shard in shards], index_shard, root)
        return folder, about

    return make


@pytest.fixture
def folder(make_folder):
    return make_folder()[0]


def test_it_is_the_same_index(folder, shards):
    beside, index = build_index(shards), build_index(find_shards(folder))
    assert (index.fingerprint, index.shards, len(index)) == (beside.fingerprint, beside.shards, 9)
    for name in ("shard", *ARRAYS):
        assert getattr(index, name).tolist() == getattr(beside, name).tolist()
        assert getattr(index, name).dtype.kind == getattr(beside, name).dtype.kind
    assert list(index.columns) == list(beside.columns) == ["aesthetic", "language", "number"]
    for name, column in beside.columns.items():
        np.testing.assert_array_equal(index.columns[name], column)
    assert {(loss.reason, loss.count) for loss in index.losses} == {(loss.reason, loss.count) for loss in beside.losses}
    assert not index.offset.flags.owndata
    assert not index.offset.flags.writeable


def test_what_was_left_out_is_told(make_folder, shards, tmp_path):
    bad = tmp_path / "shards" / "bad.tar"
    bad.write_bytes(b"\x1f\x8b" + bytes(2000))
    folder, about = make_folder(addresses=[*map(str, shards), str(bad)])
    lines = [json.loads(line) for line in (folder / REJECTED).read_text().splitlines()]
    assert lines[0]["shard"] == "x-000002.tar"
    assert (lines[0]["key"], lines[0]["reason"]) == ("000008", "no_image")
    assert lines[0]["offset"] > 0
    assert (lines[1]["shard"], lines[1]["key"]) == ("bad.tar", None)
    assert lines[1]["reason"].startswith("compressed")
    assert [shard["address"] for shard in about["shards"]] == [shard.name for shard in shards]
    assert about["num_samples"] == 9
    assert {loss.reason for loss in build_index([folder]).losses} == {"no_image", "no_caption", "compressed"}


def test_empty_shards_are_counted_and_named(make_folder, shards, tmp_path):
    empty = [tmp_path / "shards" / f"empty-{number}.tar" for number in range(2)]
    for number, path in enumerate(empty):
        with tarfile.open(path, "w") as tar:
            if number:  # a member, but of no sample
                tar.addfile(tarfile.TarInfo("readme.rst"))
    folder, about = make_folder(addresses=[*map(str, shards), *map(str, empty)])
    told, loose = (
        [(loss.shard, loss.count) for loss in build_index(where).losses if loss.reason == "empty_shard"]
        for where in ([folder], [*shards, *empty])
    )
    assert told == [("empty-0.tar and 1 more", 2)]
    assert loose == [("empty-0.tar", 1), ("empty-1.tar", 1)]
    lines = [json.loads(line) for line in (folder / REJECTED).read_text().splitlines()]
    assert [line["shard"] for line in lines if line["reason"] == "empty_shard"] == ["empty-0.tar", "empty-1.tar"]
    assert about["num_samples"] == 9


def test_nothing_to_index(make_folder, tmp_path):
    bad = tmp_path / "bad.tar"
    bad.write_bytes(b"\x1f\x8b" + bytes(2000))
    with pytest.raises(ConfigError, match="none of 1 shards has a sample"):
        make_folder(addresses=[str(bad)])
    assert not (tmp_path / "index" / MANIFEST).exists()


def test_folder_and_shards_move_together(folder, shards, tmp_path):
    before = build_index([folder]).fingerprint
    (tmp_path / "there").mkdir()
    for name in ("index", "shards"):
        (tmp_path / name).rename(tmp_path / "there" / name)
    index = build_index([tmp_path / "there" / "index"])
    assert index.fingerprint == before
    assert index.shards[0].address == str(tmp_path / "there" / "shards" / "x-000000.tar")


def test_roots(make_folder, shards, tmp_path):
    folder, _ = make_folder(root="s3://bucket/set/")
    index = build_index([folder])
    assert index.shards[1].address == "s3://bucket/set/x-000001.tar"
    assert index.shards[1].version == ""
    folder, _ = make_folder(root="/nowhere")
    with pytest.raises(ConfigError, match=r"/nowhere/x-000000\.tar cannot be read"):
        build_index([folder])
    folder, _ = make_folder(root=str(tmp_path / "shards"))
    assert build_index([folder]).shards == build_index(shards).shards


@pytest.mark.parametrize("how", ["bytes", "time", "gone"])
def test_a_shard_that_changed_is_refused_by_name(folder, shards, how):
    if how == "gone":
        shards[1].unlink()
    elif how == "time":
        os.utime(shards[1], ns=(1, 1))
    else:
        stat = shards[1].stat()
        shards[1].write_bytes(shards[1].read_bytes() + bytes(512))
        os.utime(shards[1], ns=(stat.st_mtime_ns, stat.st_mtime_ns))
    with pytest.raises(ConfigError, match=r"x-000001\.tar (is not what it was|cannot be read)"):
        build_index([folder])


def edit(folder, change):
    about = json.loads((folder / MANIFEST).read_text())
    change(about)
    (folder / MANIFEST).write_text(json.dumps(about))


DAMAGES = {
    "fingerprint": lambda about: about.update(fingerprint="0" * 64),
    "digest": lambda about: about["shards"][1].update(digest="0" * 64),
    "count": lambda about: about["shards"][1].update(num_samples=3),
    "order": lambda about: about["shards"].reverse(),
    "missing": lambda about: about.pop("shards"),
    "version": lambda about: about.update(v=99),
    "type": lambda about: about.update(shards=7),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_manifest_that_was_edited(folder, damage):
    edit(folder, DAMAGES[damage])
    with pytest.raises(ConfigError, match=r"index: .*tools/index_shards\.py"):
        build_index([folder])


@pytest.mark.parametrize("name", ["offset", "key", "column.number"])
@pytest.mark.parametrize("how", ["cut", "gone", "pickle", "shorter", "other"])
def test_columns_that_were_damaged(folder, name, how):
    path = folder / f"{name}.npy"
    array = np.load(path)
    if how == "gone":
        path.unlink()
    elif how == "cut":
        path.write_bytes(path.read_bytes()[:-5])
    elif how == "pickle":
        np.save(path, array.astype(object), allow_pickle=True)
    elif how == "shorter":
        np.save(path, array[:-1])
    elif name == "column.number":
        return
    else:
        np.save(path, array.astype("U8") if name == "key" else array.astype(np.int32))
    with pytest.raises(ConfigError, match=r"index: .*tools/index_shards\.py"):
        build_index([folder])


def test_column_names_are_no_paths(folder):
    edit(folder, lambda about: about["columns"].append("../../x"))
    assert "../../x" not in build_index([folder]).columns


def test_it_travels_as_its_name(folder):
    index = build_index([folder])
    sent = pickle.dumps(index)
    assert len(sent) < 500
    assert pickle.loads(sent).key.tolist() == index.key.tolist()
    part = pickle.loads(pickle.dumps(index.subset(slice(2, 8)).subset(slice(1, 4))))
    assert part.key.tolist() == index.key.tolist()[3:6]
    loose = index.subset(np.array([8, 3]))
    assert np.asarray(pickle.loads(pickle.dumps(loose)).key).tolist() == index.key[[8, 3]].tolist()
    edit(folder, lambda about: about.update(v=99))
    with pytest.raises(ConfigError):
        pickle.loads(sent)


def test_a_subset_takes_no_copy(folder):
    """Of a hundred million samples a copy of all that is known would be gigabytes."""
    index = build_index([folder])
    copied = index.gathered()
    for picks in ([8, 3, 4], [0, 2, 4, 6], np.arange(9) % 2 == 1):
        one, other = index.subset(np.array(picks)), copied.subset(np.array(picks))
        one, other = (part.subset(np.array([2, 0])).subset(slice(0, 2)) for part in (one, other))
        assert one.fingerprint == other.fingerprint
        assert len(pickle.dumps(one)) < 700
        for found in (one, pickle.loads(pickle.dumps(one)), one.gathered()):
            assert [found.name(n) for n in range(2)] == [other.name(n) for n in range(2)]
            for name in ("shard", *ARRAYS):
                assert (np.asarray(getattr(found, name)) == getattr(other, name)).all()
            assert (np.asarray(found.offset)[1] == found.offset[1]).all()
        assert np.shares_memory(one.size.array, index.size)
        assert one.size.chosen is one.key.chosen


def test_an_index_that_is_made_anew_under_a_run(folder, make_folder, shards):
    sent = pickle.dumps(build_index([folder]).subset(slice(0, 3)))
    make_folder(addresses=[str(shard) for shard in shards[1:]])
    with pytest.raises(ConfigError, match="changed while a run was using it"):
        pickle.loads(sent)


def test_folders_and_loose_shards_together(folder, make_shards):
    loose = make_shards(3, name="y")
    index = build_index(find_shards([folder, loose[0]]))
    assert len(index) == 12
    assert index.name(11) == "y-000000/000002"


def test_a_writer_that_is_killed_leaves_no_manifest(folder, make_folder, monkeypatch):
    def stop(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr("sdtrain.data.manifest._write_columns", stop)
    with pytest.raises(KeyboardInterrupt):
        make_folder()
    assert not (folder / MANIFEST).exists()


# verify


def test_verify_finds_a_bit(folder, shards):
    assert verify_folder(folder, 2) == []
    stat, data = shards[1].stat(), bytearray(shards[1].read_bytes())
    data[700] ^= 1
    shards[1].write_bytes(data)
    os.utime(shards[1], ns=(stat.st_mtime_ns, stat.st_mtime_ns))
    build_index([folder])
    (fault,) = verify_folder(folder, 2)
    assert fault.endswith("x-000001.tar: its bytes are not those that were indexed (sha256)")


@pytest.mark.parametrize("name", ["offset", "crc", "key", "shard"])
def test_verify_finds_damaged_rows(folder, name):
    path = folder / f"{name}.npy"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    (fault,) = verify_folder(folder, 1)
    assert "x-000002.tar: its rows in the index are damaged" in fault


def test_copies_get_their_date_into_the_manifest(folder, shards, tmp_path):
    for shard in shards:
        copy = tmp_path / "copy"
        shutil.copyfile(shard, copy)
        os.utime(copy, ns=(1, 1))
        copy.replace(shard)
    with pytest.raises(ConfigError, match="--verify"):
        build_index([folder])
    assert verify_folder(folder, 2) == []
    assert build_index([folder]).shards[2].version == "1"


def test_verify_names_what_is_gone_or_longer(folder, shards):
    shards[0].unlink()
    shards[1].write_bytes(shards[1].read_bytes() + bytes(512))
    faults = verify_folder(folder, 2)
    assert len(faults) == 2
    assert "x-000000.tar" in faults[0]
    assert "were indexed" in faults[1]
