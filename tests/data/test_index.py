"""The walk through shards: what it finds, what it refuses, and that it never loses anything in silence."""

import io
import os
import tarfile

import numpy as np
import pytest

from sdtrain.data.index import CAPTION, IMAGE, JSON, build_index, find_shards, index_path
from sdtrain.errors import ConfigError


def write_tar(path, members, format=tarfile.USTAR_FORMAT):
    """members: (name, bytes) pairs, or a TarInfo with bytes, in this order."""
    with tarfile.open(path, "w", format=format) as tar:
        for name, data in members:
            info = name if isinstance(name, tarfile.TarInfo) else tarfile.TarInfo(name)
            info.size = len(data) if info.isreg() else 0
            tar.addfile(info, io.BytesIO(data))
    return path


def members(make_sample, number):
    fields = make_sample(number)
    key = fields.pop("__key__")
    return [(f"{key}.{suffix}", data) for suffix, data in fields.items()]


def read(index, row, kind):
    data = index.shards[index.shard[row]].read_bytes()
    return data[index.offset[row, kind] :][: index.size[row, kind]]


def reasons(index):
    return {loss.reason: loss.count for loss in index.losses}


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
    assert index.name(12) == "x-000001/000012"
    assert index.losses == ()


@pytest.mark.parametrize("format", [tarfile.USTAR_FORMAT, tarfile.PAX_FORMAT, tarfile.GNU_FORMAT])
def test_formats_long_names_and_folders(tmp_path, make_sample, format):
    folder = tarfile.TarInfo("deep")
    folder.type = tarfile.DIRTYPE
    key = "deep/" + "x" * 90 if format == tarfile.GNU_FORMAT else "a" * 60 + "/" + "b" * 80
    path = write_tar(tmp_path / "a.tar", [(folder, b""), (f"{key}.JPG", b"?"), (f"{key}.txt", b"t")], format)
    index = build_index([path])
    assert [name.decode() for name in index.key] == [key]
    assert read(index, 0, CAPTION) == b"t"


def test_interleaved_members_keep_their_partners(tmp_path, make_sample):
    both = [members(make_sample, number) for number in range(3)]
    path = write_tar(tmp_path / "a.tar", [sample[kind] for kind in range(3) for sample in both])
    index = build_index([path])
    for row in range(3):
        assert read(index, row, IMAGE) == make_sample(row)["png"]
        assert read(index, row, CAPTION) == make_sample(row)["txt"]


def test_odd_samples_are_left_out_by_reason(tmp_path, make_sample):
    good = members(make_sample, 0)
    odd = [
        ("1.txt", b"no picture"),
        ("2.gif", b"?"),
        ("2.txt", b"x"),
        ("3.png", b"a"),
        ("3.png", b"b"),
        ("4.png", b"x"),
    ]
    odd += [("5\x07.png", b"x"), ("6.pyd", b"cos\nsystem\n"), ("README", b""), ("._7.png", b"")]
    index = build_index([write_tar(tmp_path / "a.tar", good + odd)])
    assert [key.decode() for key in index.key] == ["000000", "4"]
    assert reasons(index) == {"no_image": 2, "duplicate_member": 1, "bad_key": 1, "no_caption": 1}


def test_cut_at_every_block_is_never_silent_and_never_mixes(tmp_path, make_shards, make_sample):
    whole = make_shards(4)[0].read_bytes()
    end = build_index(find_shards(tmp_path / "shards"))
    last = [int((end.offset[row] + end.size[row]).max()) for row in range(4)]
    path = tmp_path / "cut.tar"
    stop = len(whole.rstrip(b"\0")) // 512 * 512 + 512 + 1024  # up to the second closing block
    for length in [*range(512, stop, 512), *range(700, stop, 512)]:
        path.write_bytes(whole[:length])
        index = build_index([path])
        assert len(index) == sum(length >= place for place in last)
        assert reasons(index)["cut_off"] == 1
        for row in range(len(index)):
            assert read(index, row, IMAGE) == make_sample(row)["png"]
            assert read(index, row, JSON) == make_sample(row)["json"]


def test_damaged_header_is_reported(tmp_path, make_shards):
    path = make_shards(10)[0]
    index = build_index([path])
    data = bytearray(path.read_bytes())
    data[index.offset[6].min() - 512 + 3] ^= 1  # the name in the first header of sample 6
    path.write_bytes(data)
    index = build_index([path])
    assert len(index) == 6
    assert reasons(index) == {"bad_header": 1}


def test_zeros_in_the_middle_are_no_end(make_shards):
    path = make_shards(10)[0]
    start = build_index([path]).offset[6].min() - 512
    data = bytearray(path.read_bytes())
    data[start : start + 2048] = bytes(2048)
    path.write_bytes(data)
    assert reasons(build_index([path]))["data_after_end"] == 1


@pytest.mark.parametrize("kind", [tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.FIFOTYPE, b"S", b"g"])
def test_refused_member(tmp_path, make_sample, kind):
    odd = tarfile.TarInfo("odd")
    odd.type = kind
    path = write_tar(tmp_path / "a.tar", [*members(make_sample, 0), (odd, b""), *members(make_sample, 1)])
    index = build_index([path])
    assert [key.decode() for key in index.key] == ["000000"]
    assert reasons(index) == {"refused_member": 1}


def test_refused_pax_key(tmp_path, make_sample):
    odd = tarfile.TarInfo("1.png")
    odd.pax_headers = {"GNU.sparse.size": "1073741824"}
    path = write_tar(tmp_path / "a.tar", [*members(make_sample, 0), (odd, b"x")], tarfile.PAX_FORMAT)
    assert reasons(build_index([path])) == {"refused_member": 1}


@pytest.mark.parametrize("data", [b"x", b"not a tar " * 1000, b"\x1f\x8b\x08" + b"\1" * 5000])
def test_no_tar_at_all(tmp_path, data):
    path = tmp_path / "a.tar"
    path.write_bytes(data)
    with pytest.raises(ConfigError, match=r"a\.tar is not a tar shard"):
        build_index([path])


def test_saved_index_is_used_and_is_the_same(make_shards, monkeypatch):
    shards = make_shards(20, per_shard=10)
    first = build_index(shards)
    assert all(index_path(shard).is_file() for shard in shards)
    monkeypatch.setattr("sdtrain.data.index.walk", None)  # walking again would fail
    second = build_index(shards)
    assert second.fingerprint == first.fingerprint
    assert np.array_equal(second.side, first.side)


def test_losses_are_kept_in_the_saved_index(tmp_path, make_shards):
    path = make_shards(3)[0]
    path.write_bytes(path.read_bytes()[:5000])
    assert build_index([path]).losses == build_index([path]).losses != ()


def test_index_is_built_again_when_the_shard_changed(make_shards, make_sample):
    path = make_shards(5)[0]
    before = build_index([path])
    status = path.stat()
    path = make_shards([make_sample(number, txt=b"PICTURE 0") for number in range(5)])[0]
    assert path.stat().st_size == status.st_size
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns + 1))
    after = build_index([path])
    assert after.fingerprint != before.fingerprint
    assert read(after, 0, CAPTION) == b"PICTURE 0"


@pytest.mark.parametrize("damage", [b"", b"PK\x03\x04 broken", None])
def test_damaged_index_is_built_again(make_shards, damage):
    path = make_shards(5)[0]
    first = build_index([path])
    saved = index_path(path)
    saved.write_bytes(saved.read_bytes()[:-100] if damage is None else damage)
    assert build_index([path]).fingerprint == first.fingerprint


def test_index_whose_offsets_point_outside_is_built_again(make_shards):
    path = make_shards(5)[0]
    first = build_index([path])
    with np.load(index_path(path)) as file:
        arrays = dict(file)
    arrays["offset"][2] = 1 << 40
    np.savez(index_path(path).open("wb"), **arrays)
    assert build_index([path]).offset.tolist() == first.offset.tolist()


def test_folder_that_cannot_be_written(make_shards, monkeypatch):
    path = make_shards(5)[0]

    def refuse(*_):
        raise PermissionError

    monkeypatch.setattr("os.replace", refuse)  # the tests may run as root, whom modes do not stop
    assert len(build_index([path])) == 5
    assert sorted(file.name for file in path.parent.iterdir()) == [path.name]


def test_fingerprint_goes_with_the_data(tmp_path, make_shards, make_sample):
    first = build_index(make_shards(5)).fingerprint
    (tmp_path / "shards").rename(tmp_path / "moved")
    moved = find_shards(tmp_path / "moved")
    assert build_index(moved).fingerprint == first
    other = build_index(make_shards([make_sample(number, png=make_sample(number + 1)["png"]) for number in range(5)]))
    assert other.fingerprint != first
    assert build_index(moved).subset(np.arange(4)).fingerprint != first


def test_find_shards(tmp_path, make_shards, monkeypatch):
    shards = make_shards(30, per_shard=10)
    build_index(shards)
    folder = tmp_path / "shards"
    assert find_shards(folder) == find_shards(str(folder / "*.tar")) == find_shards([shards[0], str(folder)]) == shards
    monkeypatch.chdir(tmp_path)
    assert [path.name for path in find_shards("shards/x-00000[01].tar")] == ["x-000000.tar", "x-000001.tar"]


@pytest.mark.parametrize("pattern", ["nothing/*.tar", "absent.tar", "pipe:cat x.tar", ".", []])
def test_no_shard_says_what_to_do(tmp_path, monkeypatch, pattern):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError, match=r"^data\.shards: .*\.tar"):
        find_shards(pattern)
