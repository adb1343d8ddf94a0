"""An export through the command line, from a run on the disk to a picture of diffusers."""

import importlib.util
import json
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[2]
TOOL = ROOT / "tools" / "export.py"


@pytest.fixture
def tool(capsys):
    """tool(arguments) -> (exit code, standard output, standard error), in this process."""
    spec = importlib.util.spec_from_file_location("export", TOOL)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    capsys.readouterr()
    return lambda *arguments: (module.main([str(argument) for argument in arguments]), *capsys.readouterr())


@pytest.mark.slow
def test_a_run_becomes_a_folder_and_a_file(tool, train, tmp_path, capsys):
    from diffusers import StableDiffusionPipeline
    from safetensors.torch import load_file

    without = ["model.class_embed_type=null", "model.projection_class_embeddings_input_dim=null"]
    run = train(tmp_path / "run", *without, "sampler=ddim", "sampler.spacing=trailing", "objective=v")
    out, file, taken = tmp_path / "new" / "out", tmp_path / "one.safetensors", tmp_path / "taken"
    taken.write_text("")
    capsys.readouterr()
    code, printed, error = tool(run, taken / "out")
    assert (code, printed, error.count("\n")) == (2, "", 1)
    assert f"cannot write {taken / 'out'}" in error
    code, printed, error = tool(run, out, "--single-file", file)
    assert (code, error) == (0, "")
    assert printed.splitlines()[:2] == [str(out), str(file)]
    newest = sorted((run / "diffusion" / "checkpoints").iterdir())[-1]
    for variant, name in ((None, "ema.safetensors"), ("non_ema", "model.safetensors")):
        pipeline, there = StableDiffusionPipeline.from_pretrained(out, variant=variant), load_file(newest / name)
        own = pipeline.unet.state_dict()
        assert all(torch.equal(there[f"model.{key}"], tensor) for key, tensor in own.items())
    manifest = json.loads((run / "diffusion" / "first_stage.json").read_text())
    assert json.loads((out / "sdtrain.json").read_text())["first_stage"] == manifest["weight_hash"]

    import numpy as np

    from sdtrain.interop.pipeline import Pipeline
    from sdtrain.ops.random import Draw

    caption = "a big red star on a white background"
    zero = torch.zeros(1, dtype=torch.int64)
    noise = Draw(0, zero, zero).normal("generation", (4, 16, 16))  # as our own pictures begin
    pipeline = StableDiffusionPipeline.from_pretrained(out)
    theirs = pipeline(caption, num_inference_steps=4, guidance_scale=3.0, latents=noise, output_type="np").images[0]
    ours = Pipeline.load(run, device="cpu")(caption, num_steps=4, guidance_scale=3.0)[0]
    assert np.abs(theirs * 255 - np.asarray(ours)).max() <= 0.5 + 255e-3


def test_what_cannot_be_told_at_once_ends_with_2_and_one_line(tool, finished, tmp_path):
    taken, full = tmp_path / "taken", tmp_path / "full"
    taken.write_text("")
    full.mkdir()
    (full / "a").write_text("")
    for arguments, expected in [
        ((tmp_path / "absent", tmp_path / "out"), "is no run: there is no"),
        ((finished, taken), f"{taken} is there already; export into a new folder"),
        ((finished, full), f"{full} is there already"),
        ((finished, tmp_path / "out", "--single-file", "x.ckpt"), "--single-file: x.ckpt must end with .safetensors"),
        ((finished, tmp_path / "out"), "StableDiffusionPipeline passes its U-Net no class_labels"),
    ]:
        code, printed, error = tool(*arguments)
        assert (code, printed) == (2, ""), arguments
        assert expected in error
        assert error.count("\n") == 1, error
    assert sorted(path.name for path in tmp_path.iterdir()) == ["full", "taken"]
