"""The tool that tells what is in some shards, through its command line; and the sheet that it draws."""

import importlib.util
import io
import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from sdtrain.data.shard_writer import write_shards

TOOL = Path(__file__).parents[2] / "tools" / "inspect_shards.py"


@pytest.fixture
def tool(capsys):
    """tool(arguments) -> (exit code, standard output, standard error), in this process."""
    spec = importlib.util.spec_from_file_location("inspect_shards", TOOL)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    capsys.readouterr()
    return lambda *arguments: (module.main([str(argument) for argument in arguments]), *capsys.readouterr())


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


def test_inspect(tool, shards, tmp_path):
    code, output, _ = tool(shards[0].parent, "--sheet", tmp_path / "sheet.png", "--num", 9)
    assert code == 0
    lines = {line.split()[0]: line.split() for line in reversed(output.splitlines()) if line.strip()}
    assert output.startswith("10 samples in 2 shards; ")
    assert lines["width"][1:] == ["100", "100", "100", "300", "300", "188.9"]
    assert lines["1:4"][1] == "5"
    assert lines["3:2"][1] == "4"
    assert lines["unreadable"][1] == "1"
    repeats = [line.split() for line in output.splitlines() if "s-00/" in line]
    assert repeats[0] == ["image", "1", "1", "2", "s-00/0004"]
    assert repeats[1][:4] == ["caption", "6", "4", "3"]
    assert "forbidden_suffix" in output
    sheet = np.asarray(Image.open(tmp_path / "sheet.png").convert("RGB")).astype(int)
    assert sheet.shape[1] > 6 * 192
    assert (np.abs(sheet - [0, 99, 200]).sum(2) < 60).mean() > 0.02
    code, output, _ = tool(shards[0].parent, "--filter", "aesthetic >= 7")
    assert output.startswith("3 samples in 2 shards; ")
    assert "aesthetic >= 7" in output
    assert tool(shards[0].parent, "--filter", "aestetic > 7")[0] == 2


def test_latents(tool, shards, first_stage):
    code, _, error = tool(shards[0].parent, "--latents", first_stage)
    assert code == 2
    assert "--size: give the pictures' side, a multiple of 2" in error
    code, output, _ = tool(shards[0].parent, "--latents", first_stage, "--size", 16)
    assert code == 0
    (said,) = [line for line in output.splitlines() if line.startswith("neighbours in pixels are")]
    assert "over 20000 pairs of 10 pictures, 16 x 16" in said
    assert -1 <= float(said.split("correlation ")[1].split()[0]) <= 1
    rows = output[output.index("channel of latents") :].split("\n")[2:6]
    assert [row.split()[0] for row in rows] == ["0", "1", "2", "3"]
