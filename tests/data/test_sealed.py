"""A cache's small files: every flipped bit of a .json is found, and a draft is nothing."""

import json

import pytest

from sdtrain.data.sealed import VERSION, read_sealed, write_sealed
from sdtrain.errors import ConfigError


def test_every_flipped_bit_is_found(tmp_path):
    path, values = tmp_path / "about.json", {"n": 12, "names": ["a", "b"], "of": {"x": 0.5, "y": None}}
    write_sealed(path, values)
    assert read_sealed(path) == {"v": VERSION} | values
    assert list(tmp_path.iterdir()) == [path]
    kept = path.read_bytes()
    for byte in range(len(kept)):
        for bit in range(8):
            data = bytearray(kept)
            data[byte] ^= 1 << bit
            path.write_bytes(data)
            if kept[byte : byte + 1].isspace() and data[byte : byte + 1].isspace():
                continue
            with pytest.raises(ConfigError, match="about.json is|is a cache of version"):
                read_sealed(path)


@pytest.mark.parametrize("content", [b"", b"{", b"[1]", b"7", b'{"v": 3}', b"\xff" * 9, b"[" * 100_000])
def test_other_files_are_refused_in_one_line(tmp_path, content):
    (tmp_path / "about.json").write_bytes(content)
    with pytest.raises(ConfigError, match="about.json is") as refused:
        read_sealed(tmp_path / "about.json")
    assert len(str(refused.value).splitlines()) == 1


def test_one_of_another_version_is_refused_by_its_number(tmp_path):
    (tmp_path / "about.json").write_text(json.dumps({"n": 1}))
    with pytest.raises(ConfigError, match=f"is a cache of version 1, this reads {VERSION}"):
        read_sealed(tmp_path / "about.json")
