"""Pictures from a finished run, through the command line."""

import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

from sdtrain.interop.pipeline import Pipeline

ROOT = Path(__file__).parents[2]
TOOL = ROOT / "tools" / "sample.py"


@pytest.fixture
def tool(capsys):
    """tool(arguments) -> (exit code, standard output, standard error), in this process."""
    spec = importlib.util.spec_from_file_location("sample", TOOL)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    capsys.readouterr()
    return lambda *arguments: (module.main([str(argument) for argument in arguments]), *capsys.readouterr())


def test_a_png_for_each_caption_and_a_grid(tool, finished, tmp_path):
    file = tmp_path / "captions.txt"
    file.write_text("\ufeffa blue ring\n\n  ../../etc/pass\u00f6rd \n", encoding="utf-8")
    out = tmp_path / "new" / "out"
    code, printed, _ = tool(finished, "a red star", "--prompts-file", file, "--out", out, "--seed", 3)
    assert code == 0
    names = ["0000_a-red-star_seed3.png", "0001_a-blue-ring_seed3.png", "0002_etc-pass-rd_seed3.png", "grid.png"]
    assert printed.splitlines() == [str(out / name) for name in names]
    assert sorted(path.name for path in out.iterdir()) == names
    assert [Image.open(out / name).size for name in names[:3]] == [(64, 64)] * 3
    assert Image.open(out / "grid.png").size[0] > 3 * 128


def test_options_reach_the_pipeline(tool, finished, tmp_path):
    def picture(*options):
        code, printed, error = tool(finished, "a red star", "--out", tmp_path, *options)
        assert code == 0, error
        return Image.open(printed.splitlines()[0]).copy()

    own = picture()
    for options in (["--seed", 1], ["--guidance", 100], ["--steps", 4], ["--sampler", "heun"], ["--raw"]):
        assert picture(*options).tobytes() != own.tobytes(), options
    assert picture("--negative", "a blue ring", "--guidance", 100).tobytes() != picture("--guidance", 100).tobytes()
    assert picture("--size", "32").size == (32, 32)
    assert picture("--size", "96x64").size == (96, 64)
    assert picture().tobytes() == own.tobytes()


def test_mistakes_end_with_2_and_one_line(tool, finished, tmp_path):
    empty, taken = tmp_path / "empty", tmp_path / "taken"
    empty.mkdir()
    taken.write_text("")
    star = (finished, "a star", "--out", tmp_path)
    for arguments, expected in [
        ((tmp_path / "absent", "a star"), "is no run: there is no"),
        ((empty, "a star"), "is no run: there is no"),
        ((finished,), "caption is missing: this run's model reads caption"),
        ((*star, "--label", "3"), "label is given, and this run's model does not read it; it reads caption"),
        ((*star, "--num", 0), "num=0 must be at least 1"),
        ((*star, "--original-size", "big"), "--original-size: 'big' is neither"),
        ((finished, "a star", "--out", taken), f"--out: cannot write to {taken}"),
        ((*star, "--sampler", "eular"), "did you mean 'euler'?"),
        ((*star, "--size", "5"), "size=5 must be a multiple of 8"),
        ((*star, "--size", "big"), "--size: 'big' is neither"),
        ((*star, "--steps", 0), "num_steps=0 must be at least 1"),
        ((finished, "--prompts-file", tmp_path / "absent.txt"), "absent.txt cannot be read"),
        ((finished, "--prompts-file", finished / "autoencoder" / "samples" / "step_00000000.png"), "cannot be read"),
    ]:
        code, printed, error = tool(*arguments)
        assert (code, printed) == (2, ""), arguments
        assert expected in error
        assert error.count("\n") == 1, error


def test_a_folder_that_cannot_be_written_is_told_before_anything_is_drawn(tool, finished, tmp_path, monkeypatch):
    monkeypatch.setattr(Pipeline, "load", lambda *_: pytest.fail("it was loaded"))
    (tmp_path / "taken").write_text("")
    code, _, error = tool(finished, "a star", "--out", tmp_path / "taken" / "below")
    assert (code, error.splitlines()[0][:23]) == (2, "--out: cannot write to ")


def test_what_is_told_reaches_the_pipeline(tool, tmp_path, monkeypatch):
    calls = []

    def pipe(captions, *options, **told):
        calls.append((captions, *options[-2:], told))
        return [Image.new("RGB", (8, 8))] * 2

    monkeypatch.setattr(Pipeline, "load", lambda *_: pipe)
    out = ("--out", tmp_path)
    for arguments, call, names in [
        (["--label", "3", "--label", "dog"], (None, None, None, {"label": ["3", "dog"]}), ["label-3", "label-dog"]),
        (["--num", "2"], (None, 2, None, {}), ["picture"] * 2),
        (
            ["--mask", "m.png", "--image", "x.png", "a star"],
            (["a star"], None, None, {"image": ["x.png"], "mask": ["m.png"]}),
            ["a-star"] * 2,
        ),
        (
            ["--source", "red x.png", "--num", "2", "--image-guidance", "1.5"],
            (None, 2, 1.5, {"source": ["red x.png"]}),
            ["red-x"] * 2,
        ),
        (["a", "--noise-level", "20"], (["a"], None, None, {"noise_level": [20]}), ["a"] * 2),
        (
            ["a", "--original-size", "64x32", "--crop-top-left", "3x4", "--target-size", "8"],
            (["a"], None, None, {"original_size": [(64, 32)], "crop_top_left": [(3, 4)], "target_size": [8]}),
            ["a"] * 2,
        ),
    ]:
        code, printed, error = tool("RUN", *arguments, *out)
        assert (code, error, calls.pop()) == (0, "", call)
        files = [Path(line).name for line in printed.splitlines()]
        assert files == [*(f"{i:04d}_{name}_seed0.png" for i, name in enumerate(names)), "grid.png"]


@pytest.mark.slow
def test_the_command_that_a_run_prints(finished, tmp_path):
    command = [sys.executable, str(TOOL), str(finished), "a red star", "--out", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env={"PYTHONPATH": str(ROOT)})
    assert (done.returncode, done.stderr) == (0, "")
    assert Path(done.stdout.splitlines()[-1]) == tmp_path / "grid.png"
