"""Pictures from a finished run, by its own weights, wherever it lies."""

import json
import os
import shutil

import numpy as np
import pytest
import torch

from sdtrain.errors import ConfigError
from sdtrain.interop.pipeline import Pipeline

CAPTIONS = ["a big red star on a white background", "a small blue ring on a navy background", "two green hearts"]


@pytest.fixture(scope="module")
def pipe(finished):
    return Pipeline.load(finished, device="cpu")


@pytest.fixture
def copy(finished, tmp_path):
    """A copy of the run, to move or to harm."""
    return shutil.copytree(finished, tmp_path / "elsewhere" / "moved")


STRONG = 100.0  # after four steps of training a caption hardly shows; guidance enlarges what it does


def pixels(pictures):
    return np.stack([np.asarray(picture) for picture in pictures]).astype(int)


def differs(one, other):
    return np.abs(pixels(one) - pixels(other)).max() > 2


def test_a_seed_is_a_picture(pipe):
    pictures = pipe(CAPTIONS[0])
    assert [(picture.size, picture.mode) for picture in pictures] == [((64, 64), "RGB")]
    assert pictures == pipe([CAPTIONS[0]], seed=0)
    assert differs(pictures, pipe(CAPTIONS[0], seed=1))


def test_a_picture_does_not_know_its_neighbours(pipe):
    together = pixels(pipe(CAPTIONS))
    assert np.abs(together[:1] - pixels(pipe(CAPTIONS[:1]))).max() <= 1  # other sums of fp32 may round otherwise
    assert np.abs(together[:2] - pixels(pipe([CAPTIONS[0], CAPTIONS[1]]))).max() <= 1
    one, other = (pipe([CAPTIONS[0], caption], guidance_scale=STRONG) for caption in CAPTIONS[1:])
    assert [a == b for a, b in zip(one, other, strict=True)] == [True, False]


def test_the_preview_of_the_run_is_what_the_pipeline_draws(pipe, finished):
    """The last grid shows the first held-out captions, drawn with the averaged weights and the run's seed."""
    from PIL import Image

    from sdtrain.callback.grid import draw_grid
    from sdtrain.contracts import Preview

    rows = [json.loads(line) for line in (finished / "metrics.jsonl").read_text().splitlines()]
    row = [row for row in rows if row.get("name") == "diffusion/samples"][-1]
    captions = row["captions"]
    ours = draw_grid(Preview(pixels(pipe(captions, seed=0)).astype(np.uint8), captions, 8))
    theirs = Image.open(finished / row["path"]).convert("RGB")
    assert ours.size == theirs.size
    assert np.abs(np.asarray(ours).astype(int) - np.asarray(theirs)).max() <= 1


def test_every_argument_changes_the_picture(pipe):
    own, strong = pipe(CAPTIONS), pipe(CAPTIONS, guidance_scale=STRONG)
    assert differs(strong, own)
    assert differs(strong, pipe(CAPTIONS, guidance_scale=1))
    assert differs(strong, pipe(CAPTIONS, guidance_scale=STRONG, negative="a small blue ring"))
    assert strong == pipe(CAPTIONS, guidance_scale=STRONG, negative="")
    assert not differs(pipe(CAPTIONS, guidance_scale=1), pipe(CAPTIONS, guidance_scale=1, negative="a ring"))
    assert differs(own, pipe(CAPTIONS, num_steps=5))
    assert differs(strong, pipe(CAPTIONS, guidance_scale=STRONG, sampler="heun"))
    assert pipe(CAPTIONS, sampler="euler") == own  # the run's sampler, with the run's steps and guidance


def test_raw_and_averaged_weights_are_those_of_the_checkpoint(pipe, finished):
    from safetensors.torch import load_file

    raw = Pipeline.load(finished, "raw", "cpu")
    newest = sorted((finished / "diffusion" / "checkpoints").iterdir())[-1]
    for which, file in ((raw, "model.safetensors"), (pipe, "ema.safetensors")):
        there, here = load_file(newest / file), which.generation.model.state_dict()
        assert all(torch.equal(there[f"model.{name}"], tensor) for name, tensor in here.items())
        encoder = which.generation.conditioner.state_dict()
        assert all(torch.equal(there[f"conditioner.{name}"], tensor) for name, tensor in encoder.items())
    assert differs(pipe(CAPTIONS), raw(CAPTIONS))


def test_another_size(pipe):
    assert [picture.size for picture in pipe(CAPTIONS[:1], size=32)] == [(32, 32)]
    assert [picture.size for picture in pipe(CAPTIONS[:1], size=(96, 64))] == [(96, 64)]
    with pytest.raises(ConfigError, match="size=36 must be a multiple of 8: the first stage divides by 4"):
        pipe(CAPTIONS, size=36)
    with pytest.raises(ConfigError, match="size=0"):
        pipe(CAPTIONS, size=0)


def test_a_moved_run_draws_the_same(pipe, copy, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    assert Pipeline.load("elsewhere/moved", device="cpu")(CAPTIONS) == pipe(CAPTIONS)


def test_a_damaged_newest_checkpoint_is_passed_over(copy):
    older, newer = sorted((copy / "diffusion" / "checkpoints").iterdir())
    os.truncate(newer / "ema.safetensors", 100)
    Pipeline.load(copy, device="cpu")
    shutil.rmtree(older)
    with pytest.raises(ConfigError, match="no checkpoint of stage 2 .1 are damaged: .*ema.safetensors"):
        Pipeline.load(copy, device="cpu")


def break_config(run):
    (run / "config.yaml").write_text("model: [unclosed")


def break_width(run):
    text = (run / "config.yaml").read_text()
    (run / "config.yaml").write_text(text.replace("vocab_size: 1024", "vocab_size: 1000"))


def break_first_stage(run):
    for name in ("autoencoder", "diffusion"):
        path = run / name / ("manifest.json" if name == "autoencoder" else "first_stage.json")
        path.write_text(path.read_text().replace('"weight_hash": "', '"weight_hash": "0'))


def evil_target(run):
    text = (run / "config.yaml").read_text()
    (run / "config.yaml").write_text(text.replace("sdtrain.sampler.euler.Euler", "os.system"))


@pytest.mark.parametrize(
    ("harm", "expected"),
    [
        (lambda run: (run / "config.yaml").unlink(), "is no run: there is no .*config.yaml"),
        (lambda run: (run / "config.yaml").write_text("a: 1"), "is not the config of a run: it has no conditioner"),
        (break_config, "config.yaml cannot be read"),
        (break_width, "does not fit the config.yaml of its run: size mismatch for conditioner"),
        (lambda run: shutil.rmtree(run / "diffusion"), "holds no checkpoint of stage 2: train it"),
        (lambda run: shutil.rmtree(run / "diffusion" / "tokenizer"), "tokenizer is missing"),
        (lambda run: shutil.rmtree(run / "autoencoder"), "first_stage.weights: no file or folder"),
        (break_first_stage, "the stage manifest is of another first stage: weight_hash"),
        (evil_target, "sampler._target_ 'os.system' is not allowed"),
    ],
)
def test_what_is_wrong_with_a_run_is_said_in_a_line(copy, harm, expected):
    harm(copy)
    with pytest.raises(ConfigError, match=expected) as caught:
        Pipeline.load(copy, device="cpu")
    assert "\n" not in str(caught.value)


def test_values_that_cannot_be(pipe, finished):
    with pytest.raises(ConfigError, match="there is no sampler 'eular'; did you mean 'euler'"):
        pipe("a star", sampler="eular")
    with pytest.raises(ConfigError, match="num_steps=0"):
        pipe("a star", num_steps=0)
    with pytest.raises(ConfigError, match="no caption"):
        pipe([])
    with pytest.raises(ConfigError, match="weights=best is neither ema nor raw"):
        Pipeline.load(finished, "best")
