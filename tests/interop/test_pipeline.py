"""Pictures from a finished run, by its own weights, wherever it lies."""

import io
import json
import os
import shlex
import shutil

import numpy as np
import pytest
import torch
from PIL import Image

from sdtrain.data.scene import GROUNDS
from sdtrain.errors import ConfigError
from sdtrain.interop.pipeline import Pipeline
from sdtrain.interop.told import example, read_told
from sdtrain.tracker.jsonl import JsonlTracker

CAPTIONS = ["a big red star on a white background", "a small blue ring on a navy background", "two green hearts"]


@pytest.fixture(scope="module")
def pipe(finished):
    return Pipeline.load(finished, device="cpu")


@pytest.fixture
def copy(finished, tmp_path):
    """A copy of the run, to move or to harm."""
    return shutil.copytree(finished, tmp_path / "elsewhere" / "moved")


STRONG = 100.0  # after four steps of training a caption hardly shows; guidance enlarges what it does


PLAIN = "model.class_embed_type=null model.projection_class_embeddings_input_dim=null"
CONDITIONS = {  # the overrides, and the steps after which the condition shows
    "label": (
        f"conditioner=label conditioner.key=ground conditioner.names=[{','.join(GROUNDS)}] {PLAIN} "
        "conditioner.num_class_embeds=9 +model.num_class_embeds=9",
        4,
    ),
    "none": (f"conditioner=none {PLAIN}", 2),
    "inpainting": (
        "conditioner=inpainting model.in_channels=9 diffusion.cache_latents=false conditioner.parts.text.width=32 "
        "conditioner.parts.text.num_heads=1 conditioner.parts.text.num_layers=1",
        30,
    ),
}


@pytest.fixture(scope="module")
def trained(train, small, finished, tmp_path_factory):
    """trained(condition) -> the run of a model with it, on the autoencoder of the finished run."""
    runs = {}

    def make(condition):
        if condition not in runs:
            overrides, num_steps = CONDITIONS[condition]
            runs[condition] = train(
                tmp_path_factory.mktemp("conditioned") / condition,
                *overrides.split(),
                "stages=[diffusion]",
                f"first_stage.weights={finished}/autoencoder",
                f"diffusion.trainer.max_steps={num_steps}",
                f"diffusion.callback.checkpoint.every_steps={num_steps}",
                base=[override for override in small if not override.startswith("conditioner.")],
            )
        return runs[condition]

    return make


def plain(*rgb, size=(64, 64)):
    return Image.new("RGB", size, rgb)


def right_half(size=(64, 64)):
    mask = Image.new("L", size, 0)
    mask.paste(255, (size[0] // 2, 0, *size))
    return mask


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
    with pytest.raises(ConfigError, match="caption: 0 for 1 pictures; give one for all, or one for each"):
        pipe([])
    with pytest.raises(ConfigError, match="weights=best is neither ema nor raw"):
        Pipeline.load(finished, "best")


# What is told beside captions, or in their place


def test_what_to_type_next(tmp_path):
    from sdtrain.config import load_config

    smoke = ["+experiment=smoke", "+model.num_class_embeds=1001"]
    parts = {
        name: load_config([*smoke, f"conditioner={name}"]).conditioner
        for name in ("text_tiny", "text_concat", "none", "label", "inpainting", "upscaling", "editing", "sdxl", "sd3")
    }
    pictures = {"inpainting": "--image FILE --mask FILE", "upscaling": "--image FILE", "editing": "--source FILE"}
    told = {name: f"'a caption' {text}" for name, text in pictures.items()} | {"label": "--label 0", "none": "--num 4"}
    assert {name: example(part) for name, part in parts.items()} == dict.fromkeys(parts, "'a caption'") | told
    rows = JsonlTracker(tmp_path / "metrics.jsonl")
    rows.image("autoencoder/samples", tmp_path, 0, ["original | reconstruction"])
    rows.image("diffusion/samples", tmp_path, 0, ["", "--no", "two\nlines", "a" * 101, "my dog's bone", "another"])
    assert shlex.split(example(parts["inpainting"], tmp_path)) == ["my dog's bone", *pictures["inpainting"].split()]
    assert example(parts["label"], tmp_path) == "--label 0"


def test_a_label(trained):
    pipe = Pipeline.load(trained("label"), "raw", device="cpu")
    assert list(pipe.inputs) == ["label"]
    own = pipe(label=3, guidance_scale=STRONG)
    assert [picture.size for picture in own] == [(64, 64)]
    assert own == pipe(label=list(GROUNDS)[3], guidance_scale=STRONG) == pipe(label="3", guidance_scale=STRONG)
    together = pipe(label=[3, "white", 3], guidance_scale=STRONG)
    assert np.abs(pixels(together[:1]) - pixels(own)).max() <= 1
    assert differs(together[1:2], pipe(label=[3, 3], guidance_scale=STRONG)[1:])
    assert not differs(pipe(label=3, num=3, guidance_scale=STRONG)[2:], together[2:])
    with pytest.raises(ConfigError, match="its label is 'pink', not a name of conditioner.names"):
        pipe(label="pink")
    with pytest.raises(ConfigError, match="its label is 8, not"):
        pipe(label=8)
    with pytest.raises(ConfigError, match="^label is missing: this run's model reads label$"):
        pipe()
    with pytest.raises(ConfigError, match="^caption is given, and this run's model does not read it; it reads label$"):
        pipe("a star", label=3)
    with pytest.raises(ConfigError, match="negative is given, and this run's model reads no caption"):
        pipe(label=3, negative="a star")
    with pytest.raises(ConfigError, match="label: 2 for 3 pictures"):
        pipe(label=[1, 2], num=3)


def test_no_condition(trained):
    pipe = Pipeline.load(trained("none"), device="cpu")
    assert not pipe.inputs
    four = pipe(num=4)
    assert len({picture.tobytes() for picture in four}) == 4
    assert np.abs(pixels(four[:1]) - pixels(pipe())).max() <= 1
    with pytest.raises(ConfigError, match="num=0"):
        pipe(num=0)
    with pytest.raises(ConfigError, match="guidance_scale is given, and this run's model reads nothing"):
        pipe(guidance_scale=3.0)
    with pytest.raises(ConfigError, match="caption is given, and .* does not read it; it reads nothing"):
        pipe("a star")


def test_a_mask_and_a_picture(trained, tmp_path):
    pipe = Pipeline.load(trained("inpainting"), "raw", device="cpu")
    mask, blue, yellow = right_half(), plain(20, 60, 200), plain(250, 240, 20)
    told = {"captions": "a red star", "mask": mask}
    own = pipe(image=blue, **told)
    half = blue.copy()
    half.paste(yellow, (32, 0))
    assert pipe(image=half, **told) == own  # nothing of what is under the mask is known
    other = pipe(image=yellow, **told)
    assert differs(own, other)
    kept = pixels(own)[:, :, :32].mean((0, 1, 2)) - pixels(other)[:, :, :32].mean((0, 1, 2))
    assert kept @ np.array([-1, -1, 1]) > 5  # what is not masked goes towards what was given: bluer, and less yellow
    assert differs(own, pipe("a red star", image=blue, mask=Image.new("L", (64, 64), 255)))
    assert differs(
        pipe(image=blue, guidance_scale=STRONG, **told), pipe("a ring", image=blue, mask=mask, guidance_scale=STRONG)
    )
    for name, picture in (("blue.png", blue), ("mask.png", mask)):
        picture.save(tmp_path / name)
    assert pipe("a red star", image=tmp_path / "blue.png", mask=str(tmp_path / "mask.png")) == own
    assert pipe("a red star", image=[blue, yellow], mask=mask)[0].size == (64, 64)
    with pytest.raises(ConfigError, match="^mask is missing: this run's model reads caption, image, mask$"):
        pipe("a red star", image=blue)
    with pytest.raises(ConfigError, match="image: .*absent.png cannot be read: No such file"):
        pipe(image=tmp_path / "absent.png", **told)
    (tmp_path / "text.png").write_text("no picture")
    with pytest.raises(ConfigError, match="image: .*text.png cannot be used: not_an_image"):
        pipe(image=tmp_path / "text.png", **told)
    with pytest.raises(ConfigError, match="image=3 is neither a path nor a picture"):
        pipe(image=3, **told)


def test_a_picture_to_enlarge_says_the_size(loaded):
    pipe = loaded(kind="upscaling")
    small = plain(20, 60, 200, size=(24, 16))
    own = pipe("a red star", image=small)
    assert own[0].size == (96, 64)
    assert differs(own, pipe("a red star", image=plain(250, 240, 20, size=(24, 16))))
    assert pipe("a red star", image=small, size=64)[0].size == (64, 64)
    assert pipe("a red star", image=small, noise_level=20) == own
    assert differs(own, pipe("a red star", image=small, noise_level=300))
    with pytest.raises(ConfigError, match="noise_level=350 must be a whole number from 0 to 349"):
        pipe("a red star", image=small, noise_level=350)
    with pytest.raises(ConfigError, match="image is missing"):
        pipe("a red star")
    with pytest.raises(ConfigError, match="size=36 must be a multiple of 8"):
        pipe("a red star", image=plain(1, 2, 3, size=(9, 16)))


def test_a_picture_to_edit(loaded):
    pipe = loaded(kind="editing")
    blue, yellow = plain(20, 60, 200), plain(250, 240, 20)
    assert differs(pipe("red", source=blue), pipe("red", source=yellow))
    assert pipe("red", source=blue) == pipe("red", source=plain(20, 60, 200, size=(128, 96)))
    both = {"source": blue, "guidance_scale": 3.0}
    assert not differs(pipe("red", image_guidance_scale=3.0, **both), pipe("red", **both))
    assert differs(pipe("red", image_guidance_scale=1.5, **both), pipe("red", **both))
    assert not differs(pipe("red", negative="", **both), pipe("red", **both))  # the null picture stays what it was
    assert differs(pipe("red", negative="blue", image_guidance_scale=1.5, **both), pipe("red", **both))
    with pytest.raises(ConfigError, match="image_scale needs a picture that training leaves out"):
        loaded()("red", image_guidance_scale=1.5)
    with pytest.raises(ConfigError, match="^image is given, and .* does not read it; it reads caption, source$"):
        pipe("red", source=blue, image=blue)


def test_a_run_on_masks_and_sources_from_shards(train, small, finished, tmp_path):
    """From shards through training, previews and validation to a picture."""
    from sdtrain.data.shard_writer import write_shards

    def png(*rgb):
        plain(*rgb).save(file := io.BytesIO(), "PNG")
        return file.getvalue()

    companions = {"source.png": png(250, 240, 20), "mask.png": png(255, 255, 255)}
    samples = [{"__key__": f"{i}", "png": png(20, 60, 8 * i), "txt": b"blue", **companions} for i in range(24)]
    write_shards(samples, tmp_path / "x-%03d.tar", 12)
    run = train(
        tmp_path / "run",
        *f"data=webdataset data.shards='{tmp_path}/*.tar' data.image_size=64 data.val=0.2".split(),
        *"conditioner=editing model.in_channels=8 diffusion.cache_latents=false".split(),
        *"conditioner.parts.text.width=32 conditioner.parts.text.num_heads=1 stages=[diffusion]".split(),
        f"first_stage.weights={finished}/autoencoder",
        "diffusion.trainer.max_steps=2",
        "diffusion.metric.caption_match=null",
        blind=False,
        base=[override for override in small if not override.startswith(("conditioner.", "data.", "diffusion.metric"))],
    )
    assert sorted((run / "diffusion" / "samples").glob("*.png"))
    pipe = Pipeline.load(run, device="cpu")
    assert pipe("blue", source=plain(250, 240, 20))[0].size == (64, 64)


def test_sizes(loaded, clip_folders):
    pipe = loaded(f"conditioner.parts.clip_l.pretrained={clip_folders}/text_encoder", kind="xl")
    own = pipe("a red star")
    assert pipe("a red star", original_size=64, crop_top_left=(0, 0), target_size=(64, 64)) == own
    changed = [
        {"original_size": (512, 64)},
        {"original_size": (64, 512)},
        {"crop_top_left": (9, 0)},
        {"target_size": 8},
    ]
    found = [pipe("a red star", **told) for told in changed]
    assert all(differs(own, pictures) for pictures in found)
    assert differs(*found[:2])
    told = {"original_size": (512, 64), "crop_top_left": (9, 3)}
    sizes = {"image_size": (64, 64), "latent_size": (16, 16)}
    batch = read_told({"caption": "a", **told}, pipe.inputs, None, sizes) | {"image_size": (64, 64)}
    assert pipe.generation.conditioner(batch)["sizes"].tolist() == [[64, 512, 9, 3, 64, 64]]
    with pytest.raises(ConfigError, match="original_size='big' is no pair of pixels"):
        pipe("a red star", original_size="big")
    with pytest.raises(
        ConfigError, match="mask is given, .* it reads caption, original_size .if given., crop_top_left"
    ):
        pipe("a red star", mask=right_half())
