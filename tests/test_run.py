"""Whole runs of both stages, as small as they go: what they leave, that they repeat, go on, and refuse."""

import json
import math
import re
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from sdtrain.config import load_config
from sdtrain.errors import ConfigError, RunError
from sdtrain.run import prove_latents, run

ROOT = Path(__file__).resolve().parents[1]
STAGES = ("autoencoder", "diffusion")


@pytest.fixture
def copy(whole, tmp_path):
    """A copy of the finished run, to go on with."""
    return shutil.copytree(whole, tmp_path / "copy")


def rows(directory, **wanted):
    """The rows of metrics.jsonl that hold these values."""
    lines = (directory / "metrics.jsonl").read_text().splitlines()
    return [row for row in map(json.loads, lines) if all(row.get(key) == value for key, value in wanted.items())]


def summary(directory):
    return json.loads((directory / "summary.json").read_text())


# What a run leaves


def test_the_layout_of_a_run(finished):
    names = {path.name for path in finished.iterdir()}
    files = {"config.yaml", "code.json", "metrics.jsonl", "summary.json", "report.html", "exit.json"}
    assert names == files | {"recognition", "autoencoder", "diffusion", "heartbeat", "lock"}
    assert json.loads((finished / "exit.json").read_text()) == {"exit_code": 0, "reason": "done"}
    for stage in STAGES:
        checkpoints = sorted(path.name for path in (finished / stage / "checkpoints").iterdir())
        assert checkpoints == ["step_00000002", "step_00000004"]
        for name in checkpoints:
            inside = {path.name for path in (finished / stage / "checkpoints" / name).iterdir()}
            assert {"model.safetensors", "ema.safetensors", "COMPLETE.json"} <= inside
        pictures = sorted(path.name for path in (finished / stage / "samples").iterdir())
        assert pictures == ["step_00000000.png", "step_00000004.png"]
        assert Image.open(finished / stage / "samples" / pictures[0]).size[0] > 4 * 128
    assert {"config.json", "diffusion_pytorch_model.safetensors"} == {
        path.name for path in (finished / "autoencoder" / "vae").iterdir()
    }
    report = (finished / "report.html").read_text()
    assert len(re.findall(r"data:image/\w+;base64,", report)) >= 4
    assert not re.search(r"""(src|href)=["']?(https?:)?//""", report)


def test_the_manifest_is_of_the_autoencoder(finished):
    manifest = json.loads((finished / "autoencoder" / "manifest.json").read_text())
    assert (manifest["down_factor"], manifest["latent_channels"], manifest["image_size"]) == (4, 4, 64)
    assert manifest["num_images"] == 64
    assert all(0 < std < math.inf for std in manifest["latent_std"])
    assert manifest == json.loads((finished / "diffusion" / "first_stage.json").read_text())
    assert manifest["weight_hash"] == summary(finished)["diffusion"]["first_stage"]


def test_every_step_has_its_row(finished):
    for stage, batch in (("autoencoder", 8), ("diffusion", 8)):
        steps = [row for row in rows(finished, stage=stage) if "loss" in row]
        assert [(row["step"], row["images"]) for row in steps] == [(step, step * batch) for step in (1, 2, 3, 4)]
        for row in steps:
            assert math.isfinite(row["loss"])
            assert row["images_per_second"] > 0
            assert row["seconds"] > 0
        assert [row["seconds"] for row in steps] == sorted(row["seconds"] for row in steps)
        pictures = rows(finished, event="image", name=f"{stage}/samples")
        assert [row["step"] for row in pictures] == [0, 4]
        assert all((finished / row["path"]).is_file() for row in pictures)
    (figures,) = [row for row in rows(finished, stage="autoencoder") if "val/psnr" in row]
    assert figures["val/psnr"] == summary(finished)["autoencoder"]["psnr"]
    (figures,) = [row for row in rows(finished, stage="diffusion") if "val/loss" in row]
    assert figures["val/loss"] == summary(finished)["diffusion"]["loss"]
    assert figures["val/x0_error"] == summary(finished)["diffusion"]["x0_error"] != figures["val_raw/x0_error"]
    assert sum(name.startswith("val_raw/x0_error_at/t") for name in figures) == 8
    for row in steps:  # of the diffusion
        seen = [value for name, value in row.items() if name.startswith("loss_at/")]
        assert min(seen) <= row["loss"] <= max(seen)
        assert row["mfu"] > 0


def test_the_summary(finished):
    found = summary(finished)
    assert (found["world_size"], found["strategy"]) == (1, "SingleDeviceStrategy")
    assert math.isfinite(found["autoencoder"]["psnr"])
    assert -1 <= found["autoencoder"]["ssim"] <= 1
    assert found["seconds"]["total"] == pytest.approx(found["seconds"]["autoencoder"] + found["seconds"]["diffusion"])
    match = found["diffusion"]["caption_match"]
    attributes = {"all", "shape", "colour", "size", "position", "ground"}
    groups = {"one", "two", "heldout"}
    assert set(match) == groups | {"ceiling", "reconstruction", "floor"}
    for shares in [match[name] for name in groups] + [
        match[limit][name] for limit in ("ceiling", "reconstruction", "floor") for name in groups
    ]:
        assert set(shares) == attributes
        assert all(0 <= share <= 1 for share in shares.values())
    assert match["ceiling"]["one"]["all"] == 1
    assert found["diffusion"]["memorisation"]["ratio"] > 0
    assert {found[stage]["steps"] for stage in STAGES} == {4}
    for stage in STAGES:
        assert found[stage]["looking"]["seconds"].keys() >= {"validation", "samples", "save"}
        assert 0 < found[stage]["looking"]["share"] < 1
        assert found[stage]["mfu"] > 0
        assert found[stage]["peak_flops"] == found[stage]["matmul_peak_flops"] > 1e8


# A seed is a run


def test_a_seed_is_a_run(train, whole, hashes, tmp_path):
    assert hashes(train(tmp_path / "again")) == hashes(whole)


def test_another_seed_is_another_run(train, whole, hashes, tmp_path):
    ours, theirs = hashes(train(tmp_path / "other", "seed=1")), hashes(whole)
    assert ours.keys() == theirs.keys()
    assert not set(ours.values()) & set(theirs.values())


def test_looking_at_the_weights_does_not_change_them(whole, finished, hashes):
    assert hashes(finished) == hashes(whole)


# The same directory again


def test_two_halves_are_a_whole(train, whole, hashes, tmp_path):
    """Each stage in two processes' worth of steps, and each stage by itself."""
    for stage in STAGES:
        for max_steps in (2, 4):
            train(tmp_path, f"stages=[{stage}]", f"{stage}.trainer.max_steps={max_steps}")
    assert hashes(tmp_path) == hashes(whole)
    for stage in STAGES:
        assert [row["step"] for row in rows(tmp_path, stage=stage) if "loss" in row] == [1, 2, 3, 4]


def test_a_stop_file_ends_with_75_and_the_rest_is_the_same(train, whole, hashes, tmp_path):
    for stage in ("recognition", "autoencoder"):
        (tmp_path / "STOP").touch()
        with pytest.raises(RunError, match="stopped by the STOP file at step 1; continue with: ") as stopped:
            train(tmp_path)
        assert stopped.value.exit_code == 75
        assert json.loads((tmp_path / "exit.json").read_text())["exit_code"] == 75
        assert [row["stage"] for row in rows(tmp_path, event="stop")][-1] == stage
    train(tmp_path)
    assert hashes(tmp_path) == hashes(whole)


def test_a_finished_run_is_not_repeated(train, copy, capsys):
    before = {path: path.stat().st_mtime_ns for path in copy.rglob("*.*") if path.parent.name != "heartbeat"}
    before = {path: time for path, time in before.items() if path.is_file()}
    train(copy)
    written = {path.name for path, time in before.items() if path.stat().st_mtime_ns != time}
    assert written == {"config.yaml", "report.html", "exit.json"}
    printed = capsys.readouterr().out
    assert "autoencoder: finished before, not repeated" in printed
    assert "diffusion: finished before, not repeated" in printed


def test_more_steps_go_on_and_other_intervals_are_free(train, copy):
    train(copy, "diffusion.trainer.max_steps=5", "diffusion.callback.checkpoint.every_steps=3", "name=other")
    steps = {stage: [row["step"] for row in rows(copy, stage=stage) if "loss" in row] for stage in STAGES}
    assert steps == {"autoencoder": [1, 2, 3, 4], "diffusion": [1, 2, 3, 4, 5]}
    assert summary(copy)["diffusion"]["steps"] == 5
    assert rows(copy, event="warning") == []


def test_another_learning_rate_goes_on_with_a_warning(train, copy):
    train(copy, "diffusion.trainer.max_steps=5", "diffusion.optim.lr=1e-3")
    (row,) = rows(copy, event="warning")
    assert row["warning"] == "diffusion.optim.lr 0.01 -> 0.001 differs from the run before"
    (last,) = [row for row in rows(copy, stage="diffusion", step=5) if "loss" in row]
    assert [last["lr/model"], last["lr/conditioner"]] == pytest.approx([1e-3, 4e-4])  # its lr_scale is 0.4


def test_captions_that_are_cut_are_told(train, tmp_path, capsys):
    train(tmp_path, "conditioner.max_tokens=4")
    (account,) = [row for row in rows(tmp_path, stage="diffusion") if "data/read" in row]
    assert account["data/cut_caption_share"] == 1
    (row,) = rows(tmp_path, event="warning")
    assert row["warning"].startswith("diffusion: captions longer than the conditioner's max_tokens lose their end: ")
    assert f"warning: {row['warning']}" in capsys.readouterr().out


def test_an_average_that_is_switched_on_later_starts_then(train, tmp_path):
    only = ["stages=[autoencoder]", "autoencoder.optim.lr=1e-3"]
    train(tmp_path, *only, "autoencoder.trainer.max_steps=2", "autoencoder.callback.ema=null")
    train(tmp_path, *only)
    names = [path.name for path in (tmp_path / "autoencoder" / "checkpoints" / "step_00000004").iterdir()]
    assert "ema.safetensors" in names


def test_stage_1_is_not_trained_on_under_stage_2(train, copy):
    """Stage 2 stands on this autoencoder: more steps of it would leave a denoiser for latents that are no more."""
    before = (copy / "autoencoder" / "manifest.json").read_text()
    with pytest.raises(ConfigError, match="stage 2 .* was trained on this autoencoder"):
        train(copy, "autoencoder.trainer.max_steps=6")
    assert (copy / "autoencoder" / "manifest.json").read_text() == before
    assert not (copy / "autoencoder" / "checkpoints" / "step_00000006").exists()


@pytest.mark.parametrize(
    ("change", "difference"),
    [
        ("model.block_out_channels=[32,64]", r"model.block_out_channels \[32, 32\] -> \[32, 64\]"),
        ("seed=1", "seed 0 -> 1"),
        ("diffusion.trainer.batch_size=16", "diffusion.trainer.batch_size 8 -> 16"),
    ],
)
def test_another_run_is_refused_in_its_directory(train, copy, change, difference):
    before = (copy / "config.yaml").read_text()
    with pytest.raises(ConfigError, match=f"holds a run of another config: {difference}"):
        train(copy, change)
    assert (copy / "config.yaml").read_text() == before


def test_resume_must_with_nothing_ends_with_3(train, tmp_path):
    with pytest.raises(RunError, match="resume=must, but no checkpoint") as caught:
        train(tmp_path, "resume=must")
    assert caught.value.exit_code == 3
    assert json.loads((tmp_path / "exit.json").read_text())["exit_code"] == 3


def test_resume_must_goes_on_from_one_stage_to_the_next(train, whole, hashes, tmp_path):
    train(tmp_path, "stages=[autoencoder]", "autoencoder.trainer.max_steps=2")
    train(tmp_path, "resume=must")
    assert hashes(tmp_path) == hashes(whole)


# Another first stage


def test_weights_of_another_run(train, whole, hashes, tmp_path):
    weights = f"first_stage.weights={whole}/autoencoder"
    train(tmp_path, "stages=[diffusion]", weights)
    only = ("diffusion",)
    assert hashes(tmp_path, only) == hashes(whole, only)
    manifests = whole / "autoencoder" / "manifest.json", tmp_path / "diffusion" / "first_stage.json"
    assert manifests[0].read_text() == manifests[1].read_text()
    assert not (tmp_path / "autoencoder").exists()


def test_stage_2_stands_on_the_stage_1_of_its_run(train, whole, tmp_path):
    """`first_stage.weights` is where stage 1 starts, and what it makes of them is what stage 2 takes."""
    train(tmp_path, f"first_stage.weights={whole}/autoencoder", "autoencoder.trainer.max_steps=1")
    theirs, ours, pinned = (
        json.loads(path.read_text())["weight_hash"]
        for path in (
            whole / "autoencoder" / "manifest.json",
            tmp_path / "autoencoder" / "manifest.json",
            tmp_path / "diffusion" / "first_stage.json",
        )
    )
    assert ours != theirs
    assert pinned == ours


def test_stage_2_without_a_first_stage(train, tmp_path):
    with pytest.raises(ConfigError, match="needs a first stage, and .*autoencoder holds none"):
        train(tmp_path, "stages=[diffusion]")


def diffusers_vae(folder, widths):
    from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL

    AutoencoderKL(
        block_out_channels=widths,
        down_block_types=["DownEncoderBlock2D"] * len(widths),
        up_block_types=["UpDecoderBlock2D"] * len(widths),
        norm_num_groups=4,
        mid_block_add_attention=False,
    ).save_pretrained(folder)
    return f"first_stage.weights={folder}"


def vae_file(folder, widths):
    """The weights alone: nothing beside them says how their latents are scaled."""
    diffusers_vae(folder, widths)
    file = folder.with_suffix(".safetensors")
    (folder / "diffusion_pytorch_model.safetensors").replace(file)
    return f"first_stage.weights={file}"


def test_weights_of_a_diffusers_folder_keep_the_scale_that_it_states(train, tmp_path):
    run = train(tmp_path / "run", "stages=[diffusion]", diffusers_vae(tmp_path / "vae", [8, 8, 8]))
    manifest = json.loads((run / "diffusion" / "first_stage.json").read_text())
    assert manifest["latent_std"] == pytest.approx([1 / 0.18215] * 4)
    assert manifest["latent_mean"] == [0.0] * 4
    assert manifest["num_images"] == 0


def test_weights_that_state_no_scale_are_measured_once(train, tmp_path):
    from sdtrain.interop.pipeline import Pipeline

    weights = vae_file(tmp_path / "vae", [8, 8, 8])
    run = train(tmp_path / "run", "stages=[diffusion]", weights, "diffusion.trainer.max_steps=1")
    measured = (run / "first_stage.manifest.json").read_text()
    assert json.loads(measured)["num_images"] == 64
    assert measured == (run / "diffusion" / "first_stage.json").read_text()
    train(run, "stages=[diffusion]", weights, "diffusion.trainer.max_steps=2")
    assert (run / "first_stage.manifest.json").read_text() == measured
    assert len(Pipeline.load(run, device="cpu")("a star")) == 1

    other = vae_file(tmp_path / "vae", [8, 8, 8])  # the same place, other weights
    with pytest.raises(ConfigError, match="weight_hash"):
        train(run, "stages=[diffusion]", other, "diffusion.trainer.max_steps=3")


def test_weights_that_do_not_fit_are_named(train, tmp_path):
    folder = diffusers_vae(tmp_path / "a", [8, 8, 16])
    with pytest.raises(ConfigError, match=r"block_out_channels is \[8, 8, 16\] there, here \[8, 8, 8\]"):
        train(tmp_path / "one", "stages=[diffusion]", folder)
    weights = vae_file(tmp_path / "b", [8, 8, 16])
    named = r"first_stage.weights: .* does not fit the configured part: \S+ is \(.*\) there and \(.*\) here"
    with pytest.raises(ConfigError, match=named):
        train(tmp_path / "run", "stages=[diffusion]", weights)


def test_a_command_that_began_nothing_can_be_mended_in_its_directory(train, whole, tmp_path):
    """What a wrong path left behind is no run; what a stage began is one."""
    (tmp_path / "wrong").mkdir()
    with pytest.raises(ConfigError, match="first_stage.weights"):
        train(tmp_path / "run", "stages=[diffusion]", f"first_stage.weights={tmp_path}/wrong")
    assert (tmp_path / "run" / "config.yaml").is_file()
    train(tmp_path / "run", "stages=[diffusion]", f"first_stage.weights={whole}/autoencoder")
    with pytest.raises(ConfigError, match="holds a run of another config"):
        train(tmp_path / "run", "stages=[diffusion]", f"first_stage.weights={whole}")


# Other parts

VARIANTS = [
    "objective=epsilon sampler=ddim",
    "objective=v sampler=heun",
    "objective=v_min_snr sampler=euler",
    "first_stage=identity model.norm_num_groups=4 model.block_out_channels=[8,8]",
    "conditioner=none",
    "+objective@diffusion.decoded=decoded_pixel",
    "+objective@diffusion.decoded=decoded_perceptual",
    "diffusion.cache_latents=false diffusion.callback.ema=null",
]


@pytest.mark.parametrize("variant", VARIANTS)
def test_every_part_trains_and_draws(train, small, whole, tmp_path, variant):
    from sdtrain.interop.pipeline import Pipeline

    shutil.copytree(whole / "recognition", tmp_path / "recognition")
    replaced = tuple(f"{option.partition('=')[0]}." for option in variant.split())
    base = [override for override in small if not override.startswith(replaced)]  # another part takes other values
    if "first_stage" not in variant:
        base.append(f"first_stage.weights={whole}/autoencoder")
    train(tmp_path, *variant.split(), "stages=[diffusion]", "diffusion.trainer.max_steps=2", base=base)
    losses = [row["loss"] for row in rows(tmp_path, stage="diffusion") if "loss" in row]
    assert len(losses) == 2
    assert all(math.isfinite(loss) for loss in losses)
    if "decoded" in variant:
        assert all(row["decoded"] > 0 for row in rows(tmp_path, stage="diffusion") if "loss" in row)
    pipe = Pipeline.load(tmp_path, device="cpu")
    (picture,) = pipe("a red star", guidance_scale=2.0) if pipe.inputs else pipe()
    assert picture.size == (64, 64)


def test_accumulation_changes_the_memory_and_not_the_weights(train, whole, tmp_path):
    from safetensors.torch import load_file

    found = []
    for num in (1, 2):
        run = train(
            tmp_path / str(num),
            "stages=[diffusion]",
            f"first_stage.weights={whole}/autoencoder",
            f"diffusion.trainer.num_accumulate={num}",
            "optim@diffusion.optim=adamw",  # Muon works in bfloat16
            "diffusion.optim.lr=1e-3",
            "diffusion.trainer.max_steps=3",
        )
        found.append(load_file(run / "diffusion" / "checkpoints" / "step_00000003" / "model.safetensors"))
    differences = torch.cat([(found[0][name] - found[1][name]).abs().flatten() for name in found[0]])
    assert 0 < differences.mean() < 1e-8
    assert differences.max() < 1e-3  # where a gradient is all but 0, Adam takes its rounding for a step of the rate


def test_a_loss_that_is_no_number_ends_with_76_and_is_not_saved(train, tmp_path):
    with pytest.raises(RunError, match="not finite: .* nothing non-finite was saved") as caught:
        train(tmp_path, "autoencoder.optim.lr=1e30")
    assert caught.value.exit_code == 76
    assert json.loads((tmp_path / "exit.json").read_text())["exit_code"] == 76
    assert not list((tmp_path / "autoencoder").glob("checkpoints/*"))


# Anybody's pictures


OWN = ["boat on a lake", "boat by a r\u00f8d house", "house on green hill", "tree on green hill", "tree at night"]


def test_own_pictures(train, small, tmp_path, capsys):
    folder, shards = tmp_path / "pictures", tmp_path / "shards"
    folder.mkdir()
    values = np.random.default_rng(0).integers(0, 255, (5, 90, 120, 3), np.uint8)
    for number, (value, caption) in enumerate(zip(values, OWN, strict=True)):
        Image.fromarray(value[: 50 + 10 * number]).save(folder / f"{number}.png")
        (folder / f"{number}.txt").write_text(caption, encoding="utf-8")
    tool = [sys.executable, str(ROOT / "tools" / "make_shards.py"), str(folder), str(shards)]
    subprocess.run(tool, check=True, env={"PYTHONPATH": str(ROOT)}, stdout=subprocess.DEVNULL)

    base = [override for override in small if not override.startswith(("data.", "+experiment="))]
    base += ["+experiment=quickstart", "data=webdataset", f"data.shards='{shards}/*.tar'"]
    run = train(tmp_path / "run", base=base, blind=False)
    assert "no word" not in capsys.readouterr().out
    found = summary(run)
    assert "caption_match" not in found["diffusion"]
    assert found["diffusion"]["memorisation"]["ratio"] > 0
    assert found["recognition"]["steps"] == 1
    assert math.isfinite(found["autoencoder"]["psnr"])
    for stage in STAGES:
        assert [row for row in rows(run, stage=stage) if math.isfinite(row.get("val/loss", math.nan))]


# The mirror


def test_wandb_offline_mirrors_the_rows(train, tmp_path, monkeypatch):
    for name in ("WANDB_API_KEY", "WANDB_MODE", "WANDB_BASE_URL"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    run = train(tmp_path / "run", "tracker=wandb", "stages=[autoencoder]")
    (segments) = sorted((run / "wandb").glob("offline-run-*"))
    leet = [Path(sys.executable).with_name("wandb"), "leet", "inspect", "--json"]
    seen = {}
    for segment in segments:
        output = subprocess.run([*leet, segment], capture_output=True, text=True, check=True).stdout
        records = [json.loads(line) for line in output.splitlines()]
        (stage,) = {record["run"]["job_type"] for record in records if record["type"] == "run"}
        items = [record["history"]["item"] for record in records if record["type"] == "history"]
        seen[stage] = {item["step"]: item["loss"] for item in items if "loss" in item}
    wanted = {row["step"]: row["loss"] for row in rows(run, stage="autoencoder") if "loss" in row}
    assert seen["autoencoder"] == pytest.approx(wanted)


@pytest.mark.parametrize(
    ("typed", "told"),
    [
        ("model.cross_attention_dim=77", "stage 2's parts do not fit each other at 64 pixels"),
        ("accelerator=auto diffusion.precision=16-mixed", "diffusion.precision=16-mixed does not exist on a CPU"),
    ],
)
def test_what_stage_2_refuses_is_told_before_stage_1(train, tmp_path, typed, told, monkeypatch):
    """Guards: the rehearsal, and the precision asked of the machine."""
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: False)
    with pytest.raises(ConfigError, match=told):
        train(tmp_path / "run", *typed.split())
    assert not (tmp_path / "run" / "recognition").exists()
    assert not (tmp_path / "run" / "autoencoder").exists()


def test_a_file_that_stage_2_lacks_is_told_before_stage_1(train, tmp_path):
    """Guard: the metrics built once at the start."""
    with pytest.raises(ConfigError, match="no file weights/pt_inception"):
        train(tmp_path / "run", "metric@diffusion.metric=diffusion_fid")
    assert not (tmp_path / "run" / "autoencoder").exists()


def test_a_finished_run_wants_no_file(train, finished, tmp_path):
    run = shutil.copytree(finished, tmp_path / "run")
    train(run, "metric@diffusion.metric=diffusion_fid", blind=False)


@pytest.mark.parametrize("name", ["memorisation", "distribution"])
def test_latents_without_pictures_refuse_what_looks_at_pictures(name, monkeypatch):
    monkeypatch.setattr("sdtrain.run.use_stored_text", lambda *_: None)
    monkeypatch.setattr("sdtrain.run.check_latents", lambda *_: 0)
    session = SimpleNamespace(cfg=SimpleNamespace(seed=0), is_first=False)
    stage = SimpleNamespace(conditioner=None, first_stage=None, metric={name: SimpleNamespace(real=None)})
    with pytest.raises(ConfigError, match=f"set diffusion.metric.{name}=null"):
        prove_latents(session, stage, None)
    stage.metric = {"distribution": SimpleNamespace(real=1)}
    prove_latents(session, stage, None)  # the real pictures' moments are in a file


@pytest.mark.parametrize(
    ("override", "told"),
    [("diffusion.optim.lr=-1", "optim.lr=-1"), ("model.block_out_channels=[]", "model: ")],
)
def test_a_bad_value_of_stage_2_ends_before_stage_1_trains(small, tmp_path, override, told):
    with pytest.raises(ConfigError, match=re.escape(told)):
        run(load_config([*small, f"output_dir='{tmp_path}'", override]))
    assert not (tmp_path / "autoencoder").exists()
