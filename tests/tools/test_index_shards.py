"""The tool that indexes, through its command line."""

import importlib.util
import io
import json
from pathlib import Path

import pytest
from PIL import Image

from sdtrain.data.index import build_index
from sdtrain.data.shard_writer import write_shards

TOOLS = Path(__file__).parents[2] / "tools"


@pytest.fixture
def tool(capsys, monkeypatch):
    """tool(name, arguments) -> (exit code, standard output, standard error), in this process and without children."""

    def run(name, *arguments):
        spec = importlib.util.spec_from_file_location(name, TOOLS / f"{name}.py")
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        if hasattr(module, "index_all"):
            monkeypatch.setattr(module, "index_all", one_by_one)
        capsys.readouterr()
        return module.main([str(argument) for argument in arguments]), *capsys.readouterr()

    return run


def one_by_one(addresses, folder, num_workers, is_deep, on_done):
    from sdtrain.data.shard_index import index_shard

    failures = {}
    for address in addresses:
        try:
            index_shard(address, folder)
        except OSError as error:
            failures[address] = str(error)
        on_done(address, failures.get(address, ""))
    return failures


def jpg(number, size):
    buffer = io.BytesIO()
    Image.new("RGB", size, (10 * number, 99, 200)).save(buffer, "JPEG")
    return buffer.getvalue()


@pytest.fixture
def shards(tmp_path):
    def sample(number):
        members = {"__key__": f"{number:04d}", "jpg": jpg(number, (300, 200) if number % 2 else (100, 400))}
        members |= {"txt": f"number {number % 4}".encode(), "json": json.dumps({"aesthetic": number}).encode()}
        if number == 5:
            members |= {"jpg": b"<html>"}
        if number == 6:
            members |= {"jpg": jpg(4, (100, 400)), "pkl": b"x"}
        return members

    return write_shards(map(sample, range(10)), tmp_path / "shards" / "s-%02d.tar", 5)


def test_beside_the_shards(tool, shards):
    code, output, _ = tool("index_shards", shards[0].parent)
    assert code == 0
    assert output.splitlines()[-1] == f"10 samples in 2 shards, fingerprint {build_index(shards).fingerprint}"
    assert "forbidden_suffix" in output
    assert "0006.pkl" in output


def test_a_folder_and_its_check(tool, shards, tmp_path):
    out = tmp_path / "index"
    (tmp_path / "shards" / "bad.tar").write_bytes(b"\x1f\x8b" + bytes(3000))
    code, output, _ = tool("index_shards", shards[0].parent, "--out", out, "--workers", 1)
    assert code == 0
    assert "shards left out" in output
    assert f"10 samples in 2 shards, fingerprint {build_index(shards).fingerprint}" in output
    assert build_index([out]).fingerprint == build_index(shards).fingerprint
    assert tool("index_shards", "--verify", out)[:2] == (0, "2 of 2 shards are what was indexed\n")
    data = bytearray(shards[0].read_bytes())
    data[600] ^= 1
    shards[0].write_bytes(data)
    code, output, error = tool("index_shards", "--verify", out)
    assert code == 1
    assert "s-00.tar: its bytes are not those" in error
    code, _, error = tool("index_shards", out)
    assert code == 2
    assert "is an index already" in error


@pytest.mark.parametrize(
    ("arguments", "said"),
    [(["nothing.tar"], "no shard matches"), (["https://h/x.tar"], "give --out"), (["pipe:cat x"], "run a command")],
)
def test_faults(tool, arguments, said):
    code, _, error = tool("index_shards", *arguments)
    assert code == 2
    assert said in error


def test_failures_end_with_1_and_leave_no_index(tool, shards, tmp_path, monkeypatch):
    def refuse(*_):
        raise OSError("the disk is gone")

    monkeypatch.setattr("sdtrain.data.shard_index.walk_shard", refuse)
    code, output, error = tool("index_shards", *shards, "--out", tmp_path / "index")
    assert code == 1
    assert "the disk is gone" in error
    assert "2 of 2 shards could not be indexed" in error
    assert not (tmp_path / "index" / "manifest.json").exists()
