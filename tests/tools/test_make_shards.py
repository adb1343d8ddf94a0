"""A folder of pictures becomes shards, through the command line."""

import importlib.util
import json
import os
import subprocess
import sys
import tarfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from sdtrain.data.index import build_index, find_shards
from sdtrain.data.reader import Reader

ROOT = Path(__file__).parents[2]
TOOL = ROOT / "tools" / "make_shards.py"


@pytest.fixture
def tool(capsys):
    """tool(arguments) -> (exit code, standard output, standard error), in this process."""
    spec = importlib.util.spec_from_file_location("make_shards", TOOL)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    capsys.readouterr()
    return lambda *arguments: (module.main([str(argument) for argument in arguments]), *capsys.readouterr())


def picture(path, value, size=(20, 20), **options):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, (value, value, value)).save(path, **options)
    return path


def read(out):
    index = build_index(find_shards(out))
    reader = Reader(index, 16, max_bad_fraction=1)
    batch = reader.batch(np.arange(len(index)), np.zeros(len(index)))
    values = ((batch["image"][:, 0, 8, 8] + 1) * 127.5).round().int().tolist()
    return dict(zip(batch["caption"], values)), [key.decode() for key in index.key]


@pytest.fixture
def folder(tmp_path):
    return tmp_path / "my pictures"


def test_masks_and_sources_go_with_their_picture(tool, folder, tmp_path):
    for name, value in (
        ("a.png", 10),
        ("a.mask.png", 255),
        ("a.source.JPG", 0),
        ("a.source.jpg", 90),
        ("b.mask.png", 40),
    ):
        picture(folder / name, value)
    for name in ("a", "b.mask"):
        (folder / f"{name}.txt").write_text(name)
    assert tool(folder, tmp_path / "out")[0] == 0
    index = build_index(find_shards(tmp_path / "out"))
    reader = Reader(index, 16)
    reader.accompany(["mask", "source"])
    assert index.key.tolist() == [b"a", b"b_mask"]  # what has a caption of its own is a picture of its own
    batch = reader.batch(np.array([0]), np.array([0]))
    assert (batch["mask"].mean(), batch["key"]) == (1, ["shard-000000/a"])
    assert (batch["source"] + 1).mean() * 127.5 == pytest.approx(90, abs=1)


def test_a_mask_of_another_size_is_told_and_capitals_are_read(tool, folder, tmp_path):
    for name, size in (("a.PNG", (20, 20)), ("a.mask.PNG", (20, 20)), ("b.png", (20, 20)), ("b.mask.png", (24, 20))):
        picture(folder / name, 255, size)
    for name in "ab":
        (folder / f"{name}.txt").write_text(name)
    code, out, _ = tool(folder, tmp_path / "out")
    assert (code, "other_size" in out) == (0, True)
    index = build_index(find_shards(tmp_path / "out"))
    assert (index.key.tolist(), index.has("mask")) == ([b"a"], True)


def test_pictures_with_text_files(tool, folder, tmp_path):
    for number, name in enumerate(["a.png", "b.JPG", "sub/c.webp", "sub/caf\u00e9 1.v2.jpeg", "a b.png", "a_b.png"]):
        path = (
            picture(folder / name, 40 * number, lossless=True)
            if "webp" in name
            else picture(folder / name, 40 * number)
        )
        path.with_suffix(".txt").write_text(f"picture {number}\n", encoding="utf-8")
    out = tmp_path / "out"
    code, output, _ = tool(folder, out)
    assert code == 0
    assert output.splitlines() == [
        f"wrote 6 samples in 1 shard to {out}",
        f"next: python -m sdtrain +experiment=quickstart data=webdataset data.shards='{out}/*.tar'",
    ]
    captions, keys = read(out)
    assert captions == {f"picture {number}": 40 * number for number in range(6)}
    assert len(set(keys)) == 6
    assert "sub_c" in keys
    assert (folder / "b.JPG").read_bytes() in next(out.glob("*.tar")).read_bytes()  # as they are


def test_capitals_of_a_camera(tool, folder, tmp_path):
    picture(folder / "X.JPG", 40)
    (folder / "X.TXT").write_text("loud")
    picture(folder / "X.mask.PNG", 255)
    assert tool(folder, tmp_path / "out")[0] == 0
    assert read(tmp_path / "out")[0] == {"loud": 40}
    with tarfile.open(next((tmp_path / "out").glob("*.tar"))) as tar:  # other readers take small letters only
        assert sorted(tar.getnames()) == ["X.jpg", "X.mask.png", "X.txt"]


def test_bad_ones_are_left_out_and_counted(tool, folder, tmp_path):
    good = picture(folder / "good.png", 10)
    good.with_suffix(".txt").write_text("good")
    picture(folder / "empty.png", 20).with_suffix(".txt").write_text("")
    picture(folder / "latin.png", 30).with_suffix(".txt").write_bytes(b"\xe4\xf6\xfc")
    picture(folder / "long.png", 30).with_suffix(".txt").write_text("x" * 1_000_000)
    picture(folder / "tiny.png", 30, size=(1, 1)).with_suffix(".txt").write_text("tiny")
    picture(folder / "alone.png", 30)
    picture(folder / "moving.gif", 30)
    (folder / "page.jpg").write_text("<html>")
    (folder / "page.txt").write_text("a page")
    (folder / "cut.png").write_bytes(good.read_bytes()[:-30])
    (folder / "cut.txt").write_text("cut")
    out = tmp_path / "out"
    code, output, _ = tool(folder, out)
    assert code == 0
    assert "wrote 2 samples" in output
    line = next(line for line in output.splitlines() if line.startswith("left out"))
    counted, _, told = line.removeprefix("left out 7: ").partition("; see ")
    names = dict(row.split("\t")[::-1] for row in Path(told).read_text().splitlines())
    assert names.keys() == {str(folder / name) for name in ("latin.png", "long.png", "tiny.png", "alone.png")} | {
        str(folder / name) for name in ("moving.gif", "page.jpg", "cut.png")
    }
    assert names[str(folder / "cut.png")] == "decode_error"
    counts = dict(part.rsplit(" ", 1) for part in counted.split(", "))
    assert counts == {
        "not_an_image": "2",
        "no_caption": "1",
        "caption_not_utf8": "1",
        "caption_too_large": "1",
        "too_small": "1",
        "decode_error": "1",
    }
    assert "1 captions are empty" in output
    assert set(read(out)[0]) == {"good", ""}


@pytest.mark.parametrize(("file", "text"), [("file_name", "caption"), ("file", "text")])
def test_captions_in_one_file(tool, folder, tmp_path, file, text):
    rows = [(f"{number}.png", f'picture {number}, "quoted"\u2028line') for number in range(3)]
    for number, (name, _) in enumerate(rows):
        picture(folder / name, 50 * number)
    expected = {f'picture {number}, "quoted" line': 50 * number for number in range(3)}
    lines = [json.dumps({file: name, text: caption}, ensure_ascii=False) for name, caption in rows]
    (folder / "captions.jsonl").write_text("\n".join([*lines, json.dumps({file: "gone.png", text: "x"}), ""]), "utf-8")
    assert "left out 1: no_such_file 1" in tool(folder, tmp_path / "a")[1]
    assert read(tmp_path / "a")[0] == expected
    (folder / "captions.jsonl").unlink()
    quoted = [caption.replace('"', '""') for _, caption in rows]
    table = "".join(f'{number}.png,"{caption}"\r\n' for number, caption in enumerate(quoted))
    (folder / "captions.csv").write_text(f"{file},{text}\r\n{table}", "utf-8-sig")
    assert tool(folder, tmp_path / "b")[0] == 0
    assert read(tmp_path / "b")[0] == expected


def test_same_bytes_each_time(tool, folder, tmp_path):
    for number in range(5):
        picture(folder / f"{number}.png", number).with_suffix(".txt").write_text("x")
    assert tool(folder, tmp_path / "a", "--samples-per-shard", 2)[0] == 0
    assert tool(folder, tmp_path / "b", "--samples-per-shard", 2)[0] == 0
    first, second = (sorted((tmp_path / name).glob("*.tar")) for name in "ab")
    assert len(first) == 3
    assert [path.read_bytes() for path in first] == [path.read_bytes() for path in second]


def test_faults_end_with_2_and_one_line(tool, folder, tmp_path):
    def fault(*arguments):
        code, output, error = tool(*arguments)
        assert code == 2
        assert output == ""
        assert len(error.splitlines()) == 1
        return error

    out = tmp_path / "out"
    assert "is not a folder" in fault(folder, out)
    folder.mkdir()
    assert "has no pictures" in fault(folder, out)
    picture(folder / "a.png", 1)
    assert "has 1 pictures and no captions. Put x.txt beside x.png" in fault(folder, out)
    (folder / "a.txt").write_bytes(b"\xff\xff")
    assert "none of its pictures can be used (caption_not_utf8 1)" in fault(folder, out)
    assert not out.exists()
    (folder / "captions.jsonl").write_text('{"file_name": "a.png", "caption": "x"}\n{"file_name": "a.png"}\n')
    assert "captions.jsonl line 2 needs file_name" in fault(folder, out)
    (folder / "captions.jsonl").write_text('{"file_name": ')
    assert "captions.jsonl line 1 is not JSON" in fault(folder, out)
    (folder / "captions.jsonl").write_text('{"file_name": "a.png", "caption": "x"}')
    (tmp_path / "file").write_text("")
    assert "the shards were not written" in fault(folder, tmp_path / "file" / "out")
    assert tool(folder, out)[0] == 0
    assert "already holds shards" in fault(folder, out)


def test_as_a_command(folder, tmp_path):
    def run(*arguments):
        command = [sys.executable, TOOL, *arguments]
        environment = {**os.environ, "PYTHONPATH": str(ROOT)}
        return subprocess.run(command, capture_output=True, text=True, timeout=60, env=environment)

    assert "captions.jsonl" in run("--help").stdout
    done = run(folder, tmp_path / "out")
    assert (done.returncode, done.stdout) == (2, "")
    assert "is not a folder" in done.stderr
