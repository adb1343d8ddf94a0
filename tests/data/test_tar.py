"""The walk through headers: whatever stands in them, it ends, stays inside the file, and says why it stopped."""

import hashlib
import io
import random
import tarfile

import pytest

from sdtrain.data.tar import Defect, Tape, walk

FORMATS = [tarfile.USTAR_FORMAT, tarfile.PAX_FORMAT, tarfile.GNU_FORMAT]


def walked(data):
    """The members, and the defect's reason."""
    found = []
    try:
        for member in walk(Tape(io.BytesIO(data)), len(data)):
            found.append(member)
    except Defect as defect:
        return found, defect.reason
    return found, ""


def make(format=tarfile.USTAR_FORMAT, names=("a.png", "b/" + "c" * 60 + ".txt", "d.json"), **headers):
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=format) as tar:
        for number, name in enumerate(names):
            info = tarfile.TarInfo(name)
            info.size, info.mtime, info.pax_headers = 700 * number, 1.5, headers if number == 1 else {}
            tar.addfile(info, io.BytesIO(bytes([number + 1]) * info.size))
    return buffer.getvalue()


def seal(header):
    """The header with its checksum right again."""
    header = header[:148] + b" " * 8 + header[156:]
    return header[:148] + b"%06o\0 " % sum(header) + header[156:]


@pytest.mark.parametrize("format", FORMATS)
def test_what_tarfile_writes(format):
    data = make(format)
    members, reason = walked(data)
    assert reason == ""
    with tarfile.open(fileobj=io.BytesIO(data)) as tar:
        assert [(m.name, m.offset, m.size) for m in members] == [(t.name, t.offset_data, t.size) for t in tar]


def test_sha256_of_the_whole_file():
    data = make()
    tape = Tape(io.BytesIO(data + bytes(3_000_000)))
    list(walk(tape, len(data) + 3_000_000))
    assert tape.sha256() == hashlib.sha256(data + bytes(3_000_000)).hexdigest()


def test_a_source_that_gives_little_at_a_time():
    class Slow(io.BytesIO):
        def read(self, num_bytes=-1):
            return super().read(min(num_bytes, 100))

    data = make()
    assert [m.name for m in walk(Tape(Slow(data)), len(data))] == [m.name for m in walked(data)[0]]


@pytest.mark.parametrize("missing", [1, 511, 512, 513, 1024])
def test_end_blocks(missing):
    data = make()
    data = data[: len(data.rstrip(b"\0")) // 512 * 512 + 512] + bytes(1024)
    assert walked(data)[1] == ""
    assert walked(data[:-missing])[1] == "cut_off"


@pytest.mark.parametrize(
    ("start", "field"),
    [
        (124, b"-0000001274\0"),
        (124, b"+0000001274\0"),
        (124, b"00_00001274\0"),
        (124, b"0x000001274\0"),
        (124, b"\x80" + bytes(9) + b"\2\xbc"),
        (124, "００".encode() + bytes(6)),
        (257, b"USTAR\0"),
        (257, b"\0\0\0\0\0\0"),
    ],
)
def test_fields_that_other_readers_read_otherwise(start, field):
    data = make()
    bad = bytearray(data[:512])
    bad[start : start + len(field)] = field
    assert walked(seal(bytes(bad)) + data[512:]) == ([], "bad_header")


@pytest.mark.parametrize(
    "kind", [b"1", b"2", b"3", b"4", b"6", b"7", b"g", b"S", b"L", b"K", b"D", b"V", b"N", b"\x01"]
)
def test_only_plain_members(kind):
    data = make()
    place = 512  # the header of b
    data = data[:place] + seal(data[place : place + 156] + kind + data[place + 157 : place + 512]) + data[place + 512 :]
    members, reason = walked(data)
    assert [member.name for member in members] == ["a.png"]
    assert reason == "refused_member"


def pax(*records, size=None, kind=b"x"):
    """A pax header with these records, as bytes."""
    body = b"".join(records)
    info = tarfile.TarInfo("pax")
    info.type, info.size = kind, len(body) if size is None else size
    return info.tobuf(tarfile.USTAR_FORMAT) + body + bytes(-len(body) % 512)


@pytest.mark.parametrize(
    ("header", "reason"),
    [
        (pax(b"20 mtime=1700000000\n"), ""),
        (pax(b"13 path=x.png\n"), "bad_header"),  # a byte less than it says
        (pax(b"14 path=x.png\n"), ""),
        (pax(b"15 path=x.png\n"), "bad_header"),
        (pax(b"+14 path=x.png\n"), "bad_header"),
        (pax(b"14 path=x\0png\n"), "bad_header"),
        (pax(b"0 path=x.png\n"), "bad_header"),
        (pax(b"14 path=x.png "), "bad_header"),
        (pax(b"12 size=-10\n"), "bad_header"),
        (pax(b"12 size=1_0\n"), "bad_header"),
        (pax(b"12 size=10\n", b"12 size=20\n"), "bad_header"),
        (pax(b"30 size=111111111111111111111\n"), "bad_header"),
        (pax(b"23 size=11111111111111\n"), "cut_off"),
        (pax(b"19 linkpath=/etc/x\n"), "refused_member"),
        (pax(b"22 GNU.sparse.major=1\n"), "refused_member"),
        (pax(b"14 path=x.png\n", kind=b"g"), "refused_member"),
        (pax(b"x" * 65537), "refused_member"),
        (pax(), "bad_header"),
        (pax(b"14 path=x.png\n") * 2, "refused_member"),
    ],
)
def test_pax_headers(header, reason):
    assert walked(header + make())[1] == reason


def test_pax_header_of_nothing():
    assert walked(pax(b"14 path=x.png\n") + bytes(1024))[1] == "bad_header"


@pytest.mark.parametrize("magic", [b"\x1f\x8b\x08", b"BZh9", b"\xfd7zXZ\0", b"\x28\xb5\x2f\xfd", b"PK\3\4"])
def test_compressed_archives_are_named(magic):
    assert walked(magic + bytes(5000))[1] == "compressed"


def mutate(data, chance):
    """The archive with a few things changed, checksums often made right again."""
    data = bytearray(data)
    for _ in range(chance.randint(1, 4)):
        place = chance.randrange(len(data))
        kind = chance.randrange(5)
        if kind == 0:
            data[place] = chance.randrange(256)
        elif kind == 1:
            field = chance.choice([(0, 100), (124, 12), (148, 8), (156, 1), (257, 8), (345, 155)])
            start = place // 512 * 512 + field[0]
            data[start : start + field[1]] = chance.choice([bytes, chance.randbytes, lambda n: b"7" * n])(field[1])
        elif kind == 2:
            del data[place : place + chance.choice([1, 512, 700])]
        elif kind == 3:
            block = place // 512 * 512
            data[block:block] = data[: chance.choice([512, 1024])]
        else:
            data = data[:place] or data
        if chance.random() < 0.7:
            for block in range(0, len(data) - 511, 512):
                if data[block + 257 : block + 262] == b"ustar":
                    data[block : block + 512] = seal(bytes(data[block : block + 512]))
    return bytes(data)


def test_fuzz():
    chance, reasons = random.Random(0), set()
    sources = [make(format) for format in FORMATS] + [pax(b"14 path=x.png\n", b"12 size=10\n") + make()]
    for _ in range(4000):
        data = mutate(chance.choice(sources), chance)
        members, reason = walked(data)
        reasons.add(reason)
        places = [(member.offset, member.offset + member.size) for member in members]
        assert all(0 < start <= stop <= len(data) for start, stop in places)
        assert all(stop <= start for (_, stop), (start, _) in zip(places, places[1:]))
    assert reasons == {"", "bad_header", "cut_off", "refused_member", "data_after_end"}


def test_an_owner_in_a_pax_header_is_no_matter():
    """What Python's tarfile writes for a user above 2097151, or with an umlaut."""
    with tarfile.open(fileobj=(file := io.BytesIO()), mode="w", format=tarfile.PAX_FORMAT) as tar:
        info = tarfile.TarInfo("a.txt")
        info.size, info.uid, info.gid, info.uname, info.gname = 1, 3_000_000, 3_000_000, "jörg", "größe"
        tar.addfile(info, io.BytesIO(b"x"))
    found, reason = walked(file.getvalue())
    assert [member.name for member in found] == ["a.txt"]
    assert reason == ""
