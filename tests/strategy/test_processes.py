"""Both stages by one command, on two processes of a CPU, with all their figures and pictures."""

import json
import subprocess
import sys

import pytest

from sdtrain.checkpoint.commit import newest_valid, verify

pytestmark = pytest.mark.slow

ADAMW = ["optim@autoencoder.optim=adamw", "optim@diffusion.optim=adamw"]
FIGURES = ["autoencoder.callback.samples.every_steps=2", "diffusion.callback.samples.every_steps=2"]
FIGURES += ["autoencoder.callback.evaluate.every_steps=2", "diffusion.callback.evaluate.every_steps=2"]
WAIT_SECONDS = 600


@pytest.fixture
def run_by(command, small, tmp_path):
    """run_by(launcher, *overrides): the run's directory; each option as it comes, nothing left out."""

    def run(launcher, *overrides):
        _, options = command(tmp_path)
        arguments = [sys.executable, *launcher, "-m", "sdtrain", *small, *ADAMW, *FIGURES, f"output_dir={tmp_path}/run"]
        launched = {"LOCAL_RANK", "NODE_RANK", "WORLD_SIZE", "RANK"}
        options["env"] = {key: value for key, value in options["env"].items() if key not in launched}
        done = subprocess.run([*arguments, *overrides], capture_output=True, timeout=WAIT_SECONDS, **options)
        assert done.returncode == 0, done.stderr[-3000:]
        return tmp_path / "run"

    return run


@pytest.mark.parametrize(
    ("launcher", "overrides"),
    [
        ([], ["strategy=deepspeed_zero2", "+strategy@diffusion.strategy=deepspeed_zero3", "precision=bf16-mixed"]),
        (["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"], ["strategy=deepspeed_zero1"]),
    ],
    ids=["plain", "torchrun"],
)
def test_both_stages(run_by, launcher, overrides):
    directory = run_by(launcher, "devices=2", *overrides)
    summary = json.loads((directory / "summary.json").read_text())
    assert (summary["world_size"], summary["strategy"]) == (2, "DeepSpeed")
    manifest = json.loads((directory / "autoencoder" / "manifest.json").read_text())
    assert summary["diffusion"]["first_stage"] == summary["autoencoder"]["weight_hash"] == manifest["weight_hash"]
    assert summary["diffusion"]["parameters"] > 100_000
    for stage in ("autoencoder", "diffusion"):
        path, skipped = newest_valid(directory / stage / "checkpoints")
        assert (path.name, skipped) == ("step_00000004", [])
        verify(path)
        names = {file.name for file in path.iterdir()}
        assert {"model.safetensors", "ema.safetensors", "optimizer_00001.safetensors"} <= names
    pictures = sorted(path.name for path in (directory / "diffusion" / "samples").iterdir())
    assert pictures == ["step_00000000.png", "step_00000002.png", "step_00000004.png"]
    rows = [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]
    for name in ("val/loss", "loss"):
        assert all(row[name] < 100 for row in rows if name in row)
