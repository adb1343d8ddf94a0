"""The plan: known counts, what is held by whom, what fits; and the line that a run without memory ends in."""

import json
import os
import re
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
import torch

from sdtrain.errors import ConfigError, RunError
from sdtrain.model.unet import UNet
from sdtrain.ops.meter import measure
from sdtrain.plan import report
from sdtrain.plan.estimate import (
    GIB,
    Estimate,
    build_stage,
    count_parameters,
    estimate,
    images_at_once,
    load,
    loss_of,
    num_devices,
    optimizer_bytes,
    strategy_of,
    training_flops,
)
from sdtrain.plan.report import CARDS, advise
from sdtrain.plan.sharding import held_bytes
from sdtrain.session import is_out_of_memory
from tools.plan import main

ROOT = Path(__file__).resolve().parents[1]
SMOKE = ["+experiment=smoke", "stages=[diffusion]"]
# Forward TFLOP of the U-Nets by pixels, from the layers' list: performance.md section 2.
FORWARD = {("unet", 256): 0.1802, ("unet", 512): 0.8032, ("unet_sd21", 256): 0.1810, ("unet_sd21", 512): 0.8042}


@pytest.fixture(scope="module")
def smoke():
    return estimate(load([*SMOKE, "conditioner=none"]), "diffusion")


@pytest.mark.parametrize(
    ("experiment", "part", "expected"),
    [
        ("sd15_512", "model", 859_520_964),
        ("sd15_512", "conditioner", 123_060_480),  # CLIP-L
        ("sd15_512", "first_stage", 83_653_863),
        ("sd21_v", "model", 865_910_724),
        ("sd21_v", "conditioner", 340_387_840),  # 23 layers of OpenCLIP-H
        ("sdxl", "model", 2_567_463_684),
        ("sdxl", "conditioner", 123_060_480 + 694_659_840),  # and OpenCLIP bigG with its projection
        ("sd3_medium", "model", 2_028_328_000),
        ("sd3_medium", "conditioner", 123_650_304 + 694_659_840 + 4_762_310_656),  # and T5-XXL's encoder
        ("sd35_large", "model", 8_056_627_520),
    ],
)
def test_parts_have_their_published_sizes_without_their_files(built, experiment, part, expected):
    assert abs(count_parameters(getattr(built(experiment), part))) == expected


@pytest.fixture(scope="module")
def built():
    kept = {}

    def build(experiment):
        if experiment not in kept:
            kept.clear()
            kept[experiment] = build_stage(load([f"+experiment={experiment}"]), "diffusion")
        return kept[experiment]

    return build


@pytest.mark.parametrize(("model", "pixels"), FORWARD)
def test_forward_work_is_that_of_the_list_of_layers(model, pixels):
    """The denoiser alone, by what the plan counts with, within one in a hundred."""
    width = {"unet": 768, "unet_sd21": 1024}[model]
    heads = {"unet": 8, "unet_sd21": [5, 10, 20, 20]}[model]
    with torch.device("meta"):
        net = UNet(cross_attention_dim=width, attention_head_dim=heads, use_linear_projection=model == "unet_sd21")

    def forward(_):
        with torch.no_grad():
            net(torch.empty(1, 4, pixels // 8, pixels // 8), torch.empty(1), {"context": torch.empty(1, 77, width)})

    assert measure(forward).flops / 1e12 == pytest.approx(FORWARD[model, pixels], rel=0.01)


@pytest.mark.slow
def test_a_full_recipe_adds_up():
    found = estimate(load(["+experiment=sd15_256"]), "diffusion")
    num = 859_520_964
    assert found.forward_flops["model"] / 1e12 == pytest.approx(0.1802, rel=0.01)
    assert found.forward_flops["first_stage"] / 1e12 == pytest.approx(0.273, rel=0.01)
    assert found.forward_flops["conditioner"] / 1e12 == pytest.approx(0.0132, rel=0.02)
    other = found.forward_flops["first_stage"] + found.forward_flops["conditioner"]
    assert found.training_flops(False) == pytest.approx(3 * found.forward_flops["model"] + other, rel=0.01)
    assert found.training_flops(True) == pytest.approx(4 * found.forward_flops["model"] + other, rel=0.05)
    assert [found.fixed_bytes[name] for name in ("weights", "gradients", "optimizer", "EMA", "buckets")] == [
        4 * num,
        4 * num,
        8 * num,
        4 * num,
        4 * num,
    ]
    assert found.step_bytes(32, True) < 0.5 * found.step_bytes(32, False)
    assert found.checkpoint_bytes == 16 * num
    assert found.latent_bytes == 2 * 4 * 32 * 32 * 2  # mean and standard deviation in 16 bits


@pytest.mark.parametrize(
    ("overrides", "per_value"),
    [
        (["optim@diffusion.optim=adamw"], 8),
        (["optim@diffusion.optim=adamw8bit"], 2 + 8 / 256),
        (["optim@diffusion.optim=muon"], 4.1),
    ],
)
def test_an_optimizer_keeps_what_a_step_of_it_made(overrides, per_value):
    stage = build_stage(load([*SMOKE, *overrides]), "diffusion")
    num = sum(p.numel() for some in stage.parts().values() for p in some)
    assert optimizer_bytes(stage) / num == pytest.approx(per_value, rel=0.02)


def test_what_is_not_configured_takes_nothing(smoke):
    assert smoke.fixed_bytes["EMA"] == smoke.fixed_bytes["weights"] > 0
    assert smoke.fixed_bytes["buckets"] == 0
    assert smoke.forward_flops["first_stage"] == 0  # its latents are cached


def one_image(overrides, name="diffusion"):
    """Forward and backward of one image: the meter, and the work of each part's forward."""
    cfg, forward = load(overrides), {}
    stage = build_stage(cfg, name)
    return measure(partial(loss_of, stage, cfg[name], 1, 64, forward), torch.bfloat16), forward


def test_what_a_run_counts_leaves_out_what_checkpointing_does_again(smoke):
    before = torch.get_rng_state()
    flops = training_flops(load([*SMOKE, "conditioner=none", "+model.gradient_checkpointing=true"]), "diffusion")
    assert flops == smoke.training_flops(False) * smoke.runs[False][0][0] == smoke.runs[False][0][2]
    assert flops == pytest.approx(3 * smoke.forward_flops["model"], rel=0.01)  # all that runs here learns
    assert torch.equal(torch.get_rng_state(), before)


def test_the_second_stage_reads_pictures_where_latents_are_not_cached():
    assert one_image([*SMOKE, "diffusion.cache_latents=false"])[1]["first_stage"] > 0


@pytest.mark.slow
@pytest.mark.parametrize(
    "overrides",
    [
        ["conditioner=none", "objective=v_zero_snr"],
        [
            "conditioner=label",
            "conditioner.num_class_embeds=5",
            "+model.num_class_embeds=5",
            "model.class_embed_type=null",
        ],
        ["model=mmdit_tiny", "+objective@diffusion.decoded=decoded_perceptual"],
    ],
)
def test_other_parts_go_through_as_well(overrides):
    meter, forward = one_image([*SMOKE, *overrides])
    assert meter.flops > 1.5 * sum(forward.values()) > 0


def test_the_first_stage_is_counted_with_its_adversary():
    with_it, _ = one_image(["+experiment=smoke"], "autoencoder")
    without, _ = one_image(["+experiment=smoke", "autoencoder.objective.discriminator=null"], "autoencoder")
    assert with_it.flops > 1.1 * without.flops


def test_a_codebook_goes_through_too():
    vq = ["first_stage=vq_tiny", "objective@autoencoder.objective=autoencoding_vq_tiny"]
    assert one_image(["+experiment=smoke", *vq], "autoencoder")[0].flops > 0


def test_a_first_stage_without_weights_has_nothing_to_train():
    assert estimate(load(["+experiment=smoke", "first_stage=identity"]), "autoencoder") is None


def test_between_and_beyond_the_runs_memory_lies_on_lines_through_them():
    runs = {True: [(1, 10, 1), (9, 26, 9), (65, 250, 65)]}
    found = Estimate(64, {}, 0, {}, {"weights": 100.0, "frozen weights": 5.0}, runs, True)
    assert [found.step_bytes(n, True) for n in (1, 5, 9, 37, 65, 70)] == [10, 18, 26, 138, 250, 270]
    assert found.total_bytes(5, True) == 123


def test_a_card_takes_what_fits_and_no_more(smoke):
    for card in CARDS:
        most = card.most_images(smoke, False)
        room = 0.92 * card.memory_gb * GIB
        assert smoke.total_bytes(most, False) <= room
        assert most == 4096 or smoke.total_bytes(most + 1, False) > room
    whole = Estimate(64, {}, 0, {}, {"weights": 200.0 * GIB}, {False: [(1, 1, 1), (2, 2, 2)]}, False)
    assert CARDS[-1].most_images(whole, False) == 0


def test_files_need_not_be_there_and_mistakes_are_still_mistakes():
    cfg = load(["+experiment=sd15_512", "model.weights=/nowhere", "data.shards=/nowhere/*.tar"])
    assert images_at_once(cfg, "diffusion") == 2048 // 64
    with pytest.raises(ConfigError, match=r"unknown key 'model\.in_channel'"):
        load(["+experiment=sd15_512", "+model.in_channel=4"])
    with pytest.raises(ConfigError, match="must be a multiple of"):
        load(["+experiment=sd15_512", "diffusion.trainer.batch_size=100"])


def test_an_encoder_of_no_known_size_is_told():
    with pytest.raises(ConfigError, match="no size is known of width 512, only of 768, 1024, 1280"):
        build_stage(
            load([*SMOKE, "conditioner=sd15", "conditioner.width=512", "model.class_embed_type=null"]), "diffusion"
        )


def test_the_tool_prints_each_stage_and_its_own_exit_codes(capsys, monkeypatch, smoke):
    monkeypatch.setattr(report, "estimate", lambda cfg, name: smoke)
    assert main(["+experiment=smoke", "devices=2", "accelerator=cpu", "optim@diffusion.optim=adamw"]) == 0
    printed = capsys.readouterr().out
    assert re.findall(r"smoke, stage (\w+), 64 px, bf16-mixed", printed) == ["autoencoder", "diffusion"]
    for word in ("parameters ", "TFLOP forward", "a checkpoint", "EMA ", "* ddp", "141 GB H200", "not measured"):
        assert printed.count(word) == 2
    # Stage 1's Muon is not sharded.
    assert re.findall(r"  deepspeed_(\w+) ", printed) == ["zero1", "zero2", "zero3", "zero2_offload"]
    assert main(["+experiment=smoke", "sede=1"]) == 2
    assert "did you mean 'seed'" in capsys.readouterr().err


def test_the_share_of_the_peak_is_the_users(capsys, monkeypatch, smoke):
    monkeypatch.setattr(report, "estimate", lambda cfg, name: smoke)

    def gpu_hours(*arguments):
        assert main([*SMOKE, "diffusion.trainer.max_steps=1000000000", *arguments]) == 0
        return float(re.search(r"141 GB H200 .* ([\d.]+)\n", capsys.readouterr().out)[1])

    assert gpu_hours("--mfu", "0.2") == pytest.approx(2 * gpu_hours(), rel=0.01)
    assert main([*SMOKE, "--mfu", "40"]) == 2


def test_stage_nodes_count_where_a_cluster_names_them():
    cfg = load(["+experiment=smoke", "cluster=slurm", "num_nodes=2", "devices=2", "cluster.autoencoder.num_nodes=1"])
    assert [num_devices(cfg, name) for name in ("autoencoder", "diffusion")] == [2, 4]
    assert [images_at_once(cfg, name) for name in ("autoencoder", "diffusion")] == [8, 8]


WHOLE = {"frozen weights": 5.0, "weights": 400.0, "gradients": 400.0, "optimizer": 800.0, "EMA": 400.0}


@pytest.mark.parametrize(
    ("strategy", "expected"),
    [
        ("ddp", {**WHOLE, "buckets": 400}),
        ("deepspeed_zero1", {"weights": 400, "gradients": 400, "master weights": 100, "optimizer": 200, "EMA": 100}),
        ("deepspeed_zero2", {"weights": 400, "gradients": 100, "master weights": 100, "optimizer": 200, "EMA": 100}),
        ("deepspeed_zero3", {"weights": 500, "gradients": 100, "master weights": 100, "optimizer": 200, "EMA": 100}),
        ("deepspeed_zero2_offload", {"weights": 400, "gradients": 0, "master weights": 0, "optimizer": 0, "EMA": 0}),
    ],
)
def test_what_is_sharded_is_a_fourth_on_each_of_four(strategy, expected):
    """A hundred values in float32."""
    held = held_bytes(WHOLE, 100, strategy, 4)
    one = 4 * 200_000_000  # however small the model is
    buckets = one if strategy == "deepspeed_zero3" else 2 * one
    assert held == {"frozen weights": 5, "buckets": buckets, **expected}


def test_in_sixteen_bits_the_master_is_not():
    whole = {name: size / 2 for name, size in WHOLE.items()}
    held = held_bytes(whole, 100, "deepspeed_zero2", 4)
    assert (held["weights"], held["master weights"], held["optimizer"]) == (200, 100, 200)


def test_the_configured_strategy_is_the_one_that_is_counted():
    named = ["auto", "ddp", "deepspeed_zero1", "deepspeed_zero3", "deepspeed_zero2_offload"]
    smoke = [*SMOKE, "optim@autoencoder.optim=adamw", "optim@diffusion.optim=adamw"]  # ZeRO cuts no matrices of Muon's
    found = [strategy_of(load([*smoke, f"strategy={name}"]), "diffusion") for name in named]
    assert found == ["ddp", *named[1:]]
    own = [*smoke, "+strategy@diffusion.strategy=deepspeed_zero2"]
    assert strategy_of(load(own), "diffusion") == "deepspeed_zero2"


@pytest.mark.slow
@pytest.mark.parametrize("averages", [["decay=0.99"], ["decay=null", "lengths=[0.05,0.1]"]])
def test_a_checkpoint_is_as_large_as_it_is_said(train, small, tmp_path, averages):
    """Within a twentieth, of a model whose state is more than its file heads."""
    typed = [argument for argument in small if not argument.startswith(("first_stage.", "conditioner."))]
    typed += ["stages=[diffusion]", "first_stage=identity", "conditioner=none", "model.class_embed_type=null"]
    typed += ["model.block_out_channels=[64,64]", "diffusion.trainer.max_steps=1"]
    typed += [f"diffusion.callback.ema.{value}" for value in averages]
    run = train(tmp_path / "run", base=typed)
    said = estimate(load(typed), "diffusion").checkpoint_bytes
    (checkpoint,) = (run / "diffusion" / "checkpoints").glob("step_*")
    assert sum(file.stat().st_size for file in checkpoint.iterdir()) == pytest.approx(said, rel=0.05)


def fake(checkpointed=False, optimizer=8 * GIB):
    """A GiB an image, a quarter of it with checkpointing; a billion parameters."""
    runs = {False: [(1, GIB, 1), (8, 8 * GIB, 8)], True: [(1, GIB // 4, 1), (8, 2 * GIB, 8)]}
    return Estimate(64, {}, 10**9, {}, {"weights": 4 * GIB, "optimizer": optimizer}, runs, checkpointed)


def test_advice_says_what_each_way_saves(monkeypatch):
    monkeypatch.setattr(report, "estimate", lambda cfg, name: fake())
    said = advise(load([*SMOKE, "diffusion.trainer.batch_size=32"]), "diffusion")
    assert said == (
        "about 44 GiB are needed, 32 GiB of them for 32 images at once (batch_size=32); lower it:"
        " diffusion.trainer.num_accumulate=2 saves 16 GiB of activations and keeps the batch;"
        " diffusion.trainer.batch_size=16 saves as much;"
        " +model.gradient_checkpointing=true saves 24 GiB;"
        " optim@diffusion.optim=adamw8bit saves 6.11 GiB of the optimizer's"
    )


def test_advice_can_be_followed(monkeypatch):
    monkeypatch.setattr(report, "estimate", lambda cfg, name: fake(checkpointed=True, optimizer=2 * GIB))
    odd = [*SMOKE, "diffusion.trainer.batch_size=45", "diffusion.trainer.num_accumulate=3"]
    said = advise(load(odd), "diffusion")
    for way in ("diffusion.trainer.num_accumulate=9", "diffusion.trainer.batch_size=15"):
        assert f"{way} saves" in said
        load([*odd, way])
    assert "gradient_checkpointing" not in said
    assert "adamw8bit" not in said
    said = advise(load([*SMOKE, "diffusion.trainer.batch_size=1"]), "diffusion")
    assert said.endswith("lower it: a smaller data.image_size")


@pytest.mark.parametrize(
    ("error", "is_one"),
    [
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."), True),
        (
            RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate 8 bytes."),
            True,
        ),
        (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"), True),
        (MemoryError(), True),
        (RuntimeError("mat1 and mat2 shapes cannot be multiplied"), False),
    ],
)
def test_what_is_out_of_memory(error, is_one):
    assert is_out_of_memory(error) == is_one


def test_a_planted_cuda_error_ends_the_run_in_one_line(train, tmp_path, monkeypatch):
    from sdtrain.stage.diffusion import DiffusionStage

    step = DiffusionStage.training_step

    def full(self, batch, batch_idx):
        if self.trainer.global_step == 2:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has ...")
        return step(self, batch, batch_idx)

    monkeypatch.setattr(DiffusionStage, "training_step", full)
    with pytest.raises(RunError) as caught:
        train(tmp_path / "run", "autoencoder.trainer.max_steps=1", "autoencoder.recognition=null", *PLAIN)
    said = str(caught.value)
    assert said.startswith("out of memory in diffusion at step 2, asking for 2.00 GiB: about ")
    assert "diffusion.trainer.num_accumulate=2 saves" in said
    assert "\n" not in said
    end = json.loads((tmp_path / "run" / "exit.json").read_text())
    assert end == {"exit_code": 1, "reason": said}


def test_what_torch_cannot_compile_ends_the_run_in_one_line(train, tmp_path, monkeypatch):
    """The guard: a thousand lines of the C++ compiler's."""
    from torch._inductor.exc import CppCompileError, InductorError

    from sdtrain.stage.diffusion import DiffusionStage

    step = DiffusionStage.training_step

    def fail(self, batch, batch_idx):
        if self.trainer.global_step == 0:
            raise InductorError(CppCompileError(["g++"], "error: conflicting declaration\n" * 1000), None)
        return step(self, batch, batch_idx)

    monkeypatch.setattr(DiffusionStage, "training_step", fail)
    with pytest.raises(RunError) as caught:
        train(tmp_path / "run", "autoencoder.trainer.max_steps=1", "autoencoder.recognition=null", *PLAIN)
    said = str(caught.value)
    assert said.startswith("diffusion.compile: torch cannot compile this network at its shapes and precision (")
    assert said.endswith("; set diffusion.compile=false, or other widths")
    assert "\n" not in said
    assert json.loads((tmp_path / "run" / "exit.json").read_text()) == {"exit_code": 1, "reason": said}


def test_another_error_stays_as_it_is(train, tmp_path, monkeypatch):
    from sdtrain.stage.autoencoder import AutoencoderStage

    def wrong(self, batch, batch_idx):
        raise RuntimeError("mat1 and mat2 shapes cannot be multiplied")

    monkeypatch.setattr(AutoencoderStage, "training_step", wrong)
    with pytest.raises(RuntimeError, match="mat1 and mat2") as caught:
        train(tmp_path / "run", "autoencoder.recognition=null", *PLAIN)
    assert not isinstance(caught.value, RunError)


PLAIN = ["autoencoder.objective.perceptual=null", "autoencoder.objective.discriminator=null"]

LIMITED = """
import os, resource, sys
from sdtrain.__main__ import leave
from sdtrain.config import load_config
from sdtrain.run import run
import sdtrain.plan.report
cfg = load_config(sys.argv[1:])
used = int(open("/proc/self/statm").read().split()[0]) * os.sysconf("SC_PAGE_SIZE")
resource.setrlimit(resource.RLIMIT_AS, (used + 600 * 2**20,) * 2)
leave(run, cfg)
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="a limit on memory is Linux's")
def test_a_cpu_that_runs_out_says_what_to_lower(small, tmp_path):
    """A real failure of the allocator: the process may take 600 MiB more, and 32 pictures 128 wide take over 2 GiB."""
    wide = [
        "first_stage.block_out_channels=[128,128]",
        "first_stage.norm_num_groups=32",
        "autoencoder.recognition=null",
    ]
    overrides = [*small, *wide, *PLAIN, "stages=[autoencoder]", f"output_dir='{tmp_path}/run'"]
    overrides += ["autoencoder.trainer.batch_size=32"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", LIMITED, *overrides]
    done = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 1
    (line,) = done.stderr.splitlines()
    assert re.match(r"error: out of memory in autoencoder at step 0, asking for \d+ bytes: about [\d.]+ GiB", line)
    assert "autoencoder.trainer.num_accumulate=2 saves" in line
    assert json.loads((tmp_path / "run" / "exit.json").read_text())["exit_code"] == 1
