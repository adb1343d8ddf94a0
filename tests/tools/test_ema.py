"""Averages of other lengths from a finished run, through the command line, and pictures drawn with them."""

import importlib.util
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

ROOT = Path(__file__).parents[2]


def load_tool(name):
    spec = importlib.util.spec_from_file_location(name, ROOT / "tools" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def tool(capsys):
    """tool(arguments) -> (exit code, standard output, standard error), in this process."""
    module = load_tool("ema")
    capsys.readouterr()
    return lambda *arguments: (module.main([str(argument) for argument in arguments]), *capsys.readouterr())


@pytest.fixture(scope="module")
def run(train, tmp_path_factory):
    """A run whose stage 2 took 24 steps, kept three lengths, and kept two of them every third step."""
    return train(
        tmp_path_factory.mktemp("runs") / "lengths",
        "diffusion.callback.ema.decay=null",
        "diffusion.callback.ema.lengths=[0.05,0.1]",
        "diffusion.callback.ema.snapshot_every_steps=3",
        "diffusion.trainer.max_steps=24",
        "diffusion.callback.checkpoint.every_steps=12",
    )


@pytest.fixture(scope="module")
def kept(train, tmp_path_factory):
    """The same with the average of length 0.08 kept beside them."""
    return train(
        tmp_path_factory.mktemp("runs") / "kept",
        "diffusion.callback.ema.decay=null",
        "diffusion.callback.ema.lengths=[0.08]",
        "diffusion.trainer.max_steps=24",
        "diffusion.callback.checkpoint.every_steps=12",
    )


def flat(averages):
    return torch.cat([averages[name].flatten() for name in sorted(averages) if name not in ("num_updates", "length")])


@pytest.mark.slow
def test_the_average_that_was_not_kept(tool, run, kept):
    code, printed, error = tool(run, "--length", 0.08)
    assert (code, error) == (0, "")
    told, path = printed.splitlines()
    assert Path(path) == run / "diffusion" / "ema" / "ema_0.080.safetensors"
    assert told.startswith("length 0.08 at 24 updates, from 16 stored averages: ")
    newest = Path("diffusion", "checkpoints", "step_00000024")
    made, expected = load_file(path), load_file(kept / newest / "ema.safetensors")
    assert made.keys() == expected.keys()
    assert float(made["length"]) == 0.08
    assert int(made["num_updates"]) == 24
    others = [load_file(run / newest / name) for name in ("ema.safetensors", "ema_0.100.safetensors")]
    near = (flat(made) - flat(expected)).norm()
    assert near < 0.05 * min((flat(other) - flat(expected)).norm() for other in others)
    assert sorted(p.name for p in (run / "diffusion" / "checkpoints").iterdir()) == ["step_00000012", "step_00000024"]


@pytest.mark.slow
def test_pictures_are_drawn_with_it(tool, run, tmp_path, capsys):
    out = tmp_path / "ema_0.080.safetensors"
    assert tool(run, "--length", 0.08, "--out", out)[0] == 0
    sample = load_tool("sample")

    def picture(*options):
        assert sample.main([str(run), "a red star", "--out", str(tmp_path), *map(str, options)]) == 0
        from PIL import Image

        return np.asarray(Image.open(capsys.readouterr().out.splitlines()[0])).astype(int)

    made, own, raw = picture("--averages", out), picture(), picture("--raw")
    assert (made != own).any()
    assert abs(made - own).mean() < abs(made - raw).mean()
    for wrong, told in (
        (tmp_path / "absent", "neither ema nor raw nor a file"),
        (run / "config.yaml", "is no safetensors file"),
        (next((run / "autoencoder" / "checkpoints").glob("*/ema.safetensors")), "holds no averages of the weights"),
    ):
        assert sample.main([str(run), "a red star", "--out", str(tmp_path), "--averages", str(wrong)]) == 2
        assert told in capsys.readouterr().err


@pytest.mark.slow
def test_what_cannot_be_made_ends_with_2_and_a_line(tool, run, tmp_path):
    for arguments, told in [
        ((tmp_path, "--length", 0.08), "keeps no power-function averages"),
        ((run, "--length", 0.08, "--stage", "autoencoder"), "keeps no power-function averages"),
        ((run, "--length", 0.4), "at most 0.289; 0.4 is not"),
        ((run, "--length", 0.005), "of it is missed, more than 10%; take a length nearer to 0.05, 0.1"),
        ((run, "--length", 0.08, "--out", run / "config.yaml" / "x"), "--out: cannot write"),
    ]:
        code, printed, error = tool(*arguments)
        assert (code, printed) == (2, ""), arguments
        assert told in error
        assert error.count("\n") == 1, error


def test_damaged_and_unfinished_ones_are_left_out(tmp_path, capsys):
    from functools import partial

    from sdtrain.checkpoint.commit import commit
    from sdtrain.checkpoint.files import write_averages

    for step in (2, 4, 6):
        averages = {
            f"ema{end}": {"w": torch.full((2,), 7.0), "num_updates": torch.tensor(step), "length": torch.tensor(length)}
            for end, length in (("", 0.05), ("_0.100", 0.1))
        }
        commit(tmp_path / "ema" / f"step_{step:08d}", partial(write_averages, averages), {"step": step}, 100)
    (tmp_path / "ema" / "step_00000004" / "ema.safetensors").write_bytes(b"")
    (tmp_path / "ema" / "step_00000008.tmp").mkdir()
    module = load_tool("ema")
    found = list(module.find(tmp_path))
    assert [(s.snapshot.num_updates, round(s.snapshot.length, 3)) for s in found] == [
        (2, 0.05), (2, 0.1), (6, 0.05), (6, 0.1),
    ]  # fmt: skip
    assert "skipped" in capsys.readouterr().err
    made, _ = module.reconstruct(tmp_path, 0.08)
    torch.testing.assert_close(made["w"], torch.full((2,), 7.0))  # what stands still stays as it is
