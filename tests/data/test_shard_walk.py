"""From members to samples: what is left out and why; and that damage never makes a wrong pair nor passes unseen."""

import io
import json
import pickle
import subprocess
import sys
import tarfile
import zlib

import numpy as np
import pytest
from PIL import Image

from sdtrain.data.layout import ABSENT, CAPTION, IMAGE, JSON
from sdtrain.data.shard_walk import walk_shard


def walked(data, check=None):
    data = data if isinstance(data, bytes) else data.read_bytes()
    return walk_shard(io.BytesIO(data), "a.tar", len(data), check)


def keys(found):
    return [key.decode() for key in found.arrays["key"]]


def reasons(found):
    return {loss.reason: loss.count for loss in found.losses}


def pairs(found, data):
    """key -> the bytes of its members."""
    rows = zip(keys(found), found.arrays["offset"].tolist(), found.arrays["size"].tolist())
    return {key: [data[o : o + s] if s != ABSENT else None for o, s in zip(*row)] for key, *row in rows}


def test_what_a_sample_is(write_tar, members, make_sample):
    path = write_tar([*members(0), *members(1, txt=" a  cafe\u0301\n".encode(), json=None), *members(2, txt=None)])
    found, data = walked(path), path.read_bytes()
    assert keys(found) == ["000000", "000001", "000002"]
    first = make_sample(0)
    assert pairs(found, data)["000000"] == [first["png"], first["txt"], first["json"]]
    assert found.arrays["size"][1, JSON] == found.arrays["size"][2, CAPTION] == ABSENT
    assert found.arrays["crc"][0].tolist() == [zlib.crc32(first[name]) for name in ("png", "txt", "json")]
    assert found.arrays["side"].tolist() == [[16, 16]] * 3
    assert found.arrays["caption_length"].tolist() == [len("picture 0"), len("a caf\u00e9"), 0]
    np.testing.assert_array_equal(found.columns["number"], [0, np.nan, 2])
    assert reasons(found) == {"no_caption": 1}
    assert found.rejections == ()
    assert found.refused == ""


@pytest.mark.parametrize("format", [tarfile.USTAR_FORMAT, tarfile.PAX_FORMAT, tarfile.GNU_FORMAT])
def test_formats_long_names_and_folders(write_tar, format):
    folder = tarfile.TarInfo("deep")
    folder.type = tarfile.DIRTYPE
    key = "deep/" + "x" * 90 if format == tarfile.GNU_FORMAT else "a" * 60 + "/" + "b" * 80
    found = walked(write_tar([(folder, b""), (f"{key}.JPG", b"?"), (f"{key}.txt", b"t")], format=format))
    assert keys(found) == [key]


@pytest.mark.parametrize(
    ("orientation", "suffix", "side"), [(1, "JPEG", (30, 20)), (6, "JPEG", (20, 30)), (8, "WEBP", (20, 30))]
    + [(5, "PNG", (20, 30)), (3, "JPEG", (30, 20)), (None, "PNG", (30, 20)), (77, "JPEG", (30, 20))],
)  # fmt: skip
def test_side_is_upright(write_tar, orientation, suffix, side):
    exif, buffer = Image.Exif(), io.BytesIO()
    exif[0x0112] = orientation
    Image.new("RGB", (30, 20)).save(buffer, suffix, **({"exif": exif} if orientation else {}))
    found = walked(write_tar([("0.jpg", buffer.getvalue()), ("0.txt", b"x")]))
    assert found.arrays["side"].tolist() == [list(side)]


def test_broken_exif_leaves_the_size(write_tar):
    buffer = io.BytesIO()
    Image.new("RGB", (30, 20)).save(buffer, "JPEG", exif=b"Exif\0\0MM\0*\xff\xff\xff\xff")
    assert walked(write_tar([("0.jpg", buffer.getvalue())])).arrays["side"].tolist() == [[30, 20]]


def test_odd_samples_are_left_out_by_reason(write_tar, members):
    odd = [
        ("1.txt", b"no picture"),
        ("2.gif", b"?"),
        ("2.txt", b"x"),
        ("3.png", b"a"),
        ("3.png", b"b"),
        ("4.png", b"x"),
    ]
    odd += [("5.cls", b"0"), ("5.png", b"x"), ("README", b""), ("._7.png", b""), ("8.v1.png", b"x")]
    found = walked(write_tar([*members(0), *odd]))
    assert keys(found) == ["000000", "4", "5"]
    assert reasons(found) == {"no_image": 2, "duplicate_member": 1, "no_caption": 2, "ignored_member": 5}
    assert {(r.key, r.reason) for r in found.rejections} == {
        ("1", "no_image"),
        ("2", "no_image"),
        ("3", "duplicate_member"),
    }
    notes = {loss.reason: loss.note for loss in found.losses}
    assert notes["ignored_member"] == "members that are not read: .gif 1, .cls 1, . 1, ._7.png 1, .v1.png 1"


def test_interleaved_members_are_no_samples(write_tar, members):
    both = [members(number) for number in range(3)]
    found = walked(write_tar([sample[kind] for kind in range(3) for sample in both]))
    assert keys(found) == []
    assert reasons(found)["interleaved"] >= 3


def test_a_key_that_comes_again_takes_both_out(write_tar, members):
    found = walked(write_tar([*members(0), *members(1), *members(2), *members(1, png=members(5)[0][1]), *members(3)]))
    assert keys(found) == ["000000", "000002", "000003"]
    assert found.columns["number"].tolist() == [0, 2, 3]
    assert reasons(found) == {"interleaved": 2}
    assert len({rejection.offset for rejection in found.rejections}) == 2


BAD_NAMES = [
    "../../etc/passwd.jpg",
    "a/../../b.jpg",
    "/abs.jpg",
    "/root/x.jpg",
    "a\nb.jpg",
    "a\x07b.jpg",
    "a\u202eb.jpg",
]
BAD_NAMES += ["c\\win.jpg", "C:\\win.jpg", "x" * 256 + ".jpg"]


@pytest.mark.parametrize("name", BAD_NAMES)
def test_path_tricks(write_tar, members, name):
    found = walked(write_tar([*members(0), (name, b"x"), *members(1)], format=tarfile.PAX_FORMAT))
    assert keys(found) == ["000000", "000001"]
    assert reasons(found) == {"bad_key": 1}


def test_names_that_are_no_text(write_tar, members):
    data = write_tar([*members(0), ("QQQQ.jpg", b"x"), *members(1)]).read_bytes()
    for raw in (b"QQ\xffQ", b"Q\0QQ"):
        header = data.index(b"QQQQ")
        block = data[header : header + 512].replace(b"QQQQ", raw)
        block = block[:148] + b"%06o\0 " % (sum(block) - sum(block[148:156]) + 256) + block[156:]
        assert keys(walked(data[:header] + block + data[header + 512 :])) == ["000000", "000001"]


def test_with_a_check_what_the_reader_would_refuse_is_left_out(write_tar, members):
    bad = {1: {"png": b"<html>"}, 2: {"txt": b"\xff\xfe\xfd"}, 3: {"json": b"[" * 9999}, 4: {"txt": b"x" * 99999}}
    path = write_tar([m for number in range(7) for m in members(number, **bad.get(number, {}))])
    assert keys(walked(path)) == [f"{number:06d}" for number in range(7)]
    assert walked(path).arrays["side"][:2].tolist() == [[16, 16], [0, 0]]
    seen = []
    found = walked(path, lambda data: seen.append(data) or ("decoder_died" if len(seen) == 6 else ""))
    assert keys(found) == ["000000", "000006"]
    assert reasons(found) == {
        "not_an_image": 1,
        "caption_not_utf8": 1,
        "bad_json": 1,
        "caption_too_large": 1,
        "decoder_died": 1,
    }


# Damage


@pytest.fixture
def shard(make_shards, make_sample):
    return make_shards([make_sample(number, json=None if number == 2 else b"{}") for number in range(4)])[
        0
    ].read_bytes()


def blocks(data):
    return range(len(data.rstrip(b"\0")) // 512 + 3)


def test_a_cut_anywhere_is_told_and_never_mixes(shard):
    whole, stop = pairs(walked(shard), shard), len(shard.rstrip(b"\0")) // 512 * 512 + 512 + 1024
    for length in sorted({*range(512, stop, 512), *range(700, stop, 512), *range(1, stop, 511)}):
        found = walked(shard[:length])
        assert {"cut_off", "bad_header"} & reasons(found).keys()
        got = pairs(found, shard[:length])
        assert got.items() <= whole.items()
        assert list(got) == list(whole)[: len(got)]
    assert len(got) == 3  # the last one might have had more members
    assert reasons(walked(shard[:stop])) == {}


@pytest.mark.parametrize("bit", range(8))
def test_a_flipped_bit_in_every_block_is_told_and_never_mixes(shard, bit):
    """In a header the walk says so. In the bytes of a member nothing else changes, and its crc tells a reader later."""
    whole = walked(shard)
    intact, chance = pairs(whole, shard), np.random.default_rng(bit)
    for block in blocks(shard):
        for place in chance.choice(512, 8, replace=False).tolist():
            damaged = bytearray(shard)
            damaged[512 * block + place] ^= 1 << bit
            damaged = bytes(damaged)
            found = walked(damaged)
            assert found.sha256 != whole.sha256
            for key, members in pairs(found, damaged).items():
                assert sum(a != b for a, b in zip(members, intact[key])) <= 1
            told = found.losses != whole.losses or found.rejections != whole.rejections or found.refused
            same_places = all((found.arrays[n].tolist() == whole.arrays[n].tolist()) for n in ("offset", "size", "key"))
            assert told or same_places
            for row, crcs in enumerate(whole.arrays["crc"]):  # through the index that was made before
                for kind in (IMAGE, CAPTION, JSON):
                    start, size = whole.arrays["offset"][row, kind], whole.arrays["size"][row, kind]
                    if size != ABSENT and zlib.crc32(damaged[start : start + size]) == crcs[kind]:
                        assert damaged[start : start + size] == intact[keys(whole)[row]][kind]


def test_no_bit_of_a_header_goes_unseen(shard):
    whole = walked(shard)
    header = int(whole.arrays["offset"][3].min()) - 512
    for bit in sorted({*range(0, 4096, 5), *range(8 * 148, 8 * 157)}):
        damaged = bytearray(shard)
        damaged[header + bit // 8] ^= 1 << bit % 8
        found = walked(bytes(damaged))
        if found.losses != whole.losses:
            assert keys(found) == ["000000", "000001"]  # of the one before it nobody knows whether it was whole
            assert reasons(found) == {"bad_header": 1, "incomplete": 1}
        else:  # in the checksum's own field a leading 0 became a blank, which is the same number
            assert 148 <= bit // 8 < 156
            assert keys(found) == keys(whole)


def test_zeros_in_the_middle_are_no_end(shard):
    start = int(walked(shard).arrays["offset"][1, IMAGE]) - 512
    found = walked(shard[:start] + bytes(2048) + shard[start + 2048 :])
    assert reasons(found)["data_after_end"] == 1


# Attacks


class Bomb:
    def __init__(self, mark):
        self.mark = mark

    def __reduce__(self):
        return open, (str(self.mark), "w")


ATTACK = """
import sys
from pathlib import Path
from sdtrain.data.index import build_index
from sdtrain.ops.memory import peak_memory_bytes
before = peak_memory_bytes()
for path in map(Path, sys.argv[1:]):
    try:
        index = build_index([path])
        print(path.name, *(key.decode() for key in index.key), *(f"{l.reason}={l.count}" for l in index.losses))
        print(*(loss.note for loss in index.losses if loss.reason == "forbidden_suffix"))
    except ValueError as error:
        print(path.name, error)
print("grew", (peak_memory_bytes() - before) >> 20)
"""


def png_header(width, height):
    chunk = b"IHDR" + width.to_bytes(4, "big") + height.to_bytes(4, "big") + b"\x08\x02\0\0\0"
    return b"\x89PNG\r\n\x1a\n" + (13).to_bytes(4, "big") + chunk + zlib.crc32(chunk).to_bytes(4, "big")


def png_text_bomb():
    body = b"zTXta\0\0" + zlib.compress(bytes(250_000_000), 1)
    return png_header(16, 16) + (len(body) - 4).to_bytes(4, "big") + body + zlib.crc32(body).to_bytes(4, "big")


def test_attacks_run_nothing_and_swell_nothing(tmp_path, write_tar, members):
    mark = tmp_path / "ran"
    code, packed = pickle.dumps(Bomb(mark)), zlib.compress(bytes(250_000_000), 1, 31)
    names = ["x.pkl", "x.pickle", "x.pyd", "x.pth", "x.npz", "x.txt.gz", "x.json.gz"]
    forbidden = [(name, packed if "gz" in name else code) for name in names]
    sparse = tarfile.TarInfo("1.png")
    sparse.pax_headers = {"GNU.sparse.size": "1073741824", "GNU.sparse.major": "1"}
    links = []
    for kind in (tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.FIFOTYPE, tarfile.CHRTYPE, tarfile.GNUTYPE_SPARSE):
        link = tarfile.TarInfo("1.png")
        link.type, link.linkname = kind, "/etc/passwd"
        links.append(link)
    jsons = [b"[" * 200_000, b'{"a":' * 40_000, b'{"a": 1e999, "b": NaN}', b'{"a": ' + b"9" * 9999 + b"}", b"\xff"]
    jsons.append(json.dumps({f"k{n}": n for n in range(9999)}).encode())
    shards = [
        write_tar([*members(0), *forbidden, *members(1)], "forbidden.tar"),
        write_tar([*members(0), (sparse, b"x")], "sparse.tar", tarfile.PAX_FORMAT),
        *(write_tar([*members(0), *members(1), (link, b"")], f"link{n}.tar") for n, link in enumerate(links)),
        write_tar([m for n, j in enumerate(jsons) for m in members(n, json=j)], "json.tar"),
        write_tar([*members(0, png=png_header(30_000, 30_000)), *members(1, png=png_text_bomb())], "bomb.tar"),
        write_tar([("c.__bad__", b""), ("d.__key__", b"x"), ("e.__url__", b"x"), *members(0)], "webdataset.tar"),
        write_tar([(f"{n}.exe", b"") for n in range(3000)], "many.tar"),
    ]
    (tmp_path / "whole.tar").write_bytes(zlib.compress(shards[0].read_bytes(), 9, 31))
    arguments = [sys.executable, "-c", ATTACK, *map(str, shards), str(tmp_path / "whole.tar")]
    done = subprocess.run(arguments, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    said = {line.split()[0]: line.split(maxsplit=1)[-1] for line in lines if line}
    assert said["forbidden.tar"] == "000000 000001 forbidden_suffix=7"
    assert "never opened: 'x.pkl', 'x.pickle', 'x.pyd', 'x.pth', 'x.npz'" in lines
    assert said["sparse.tar"] == "incomplete=1 refused_member=1"
    assert {said[f"link{n}.tar"] for n in range(5)} == {"000000 incomplete=1 refused_member=1"}
    assert said["json.tar"] == "000000 000001 000002 000003 000004 000005"
    assert said["bomb.tar"] == "000000 000001"
    assert said["webdataset.tar"] == "000000 ignored_member=3"
    assert said["many.tar"] == "empty_shard=1 ignored_member=3000"
    assert "gzip file" in said["whole.tar"]
    assert int(said["grew"]) < 200
    assert not mark.exists()
