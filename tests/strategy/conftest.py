"""Runs of both stages in processes of their own, as small as they go; each kind is launched once and shared."""

import json
import os
import shutil
import subprocess
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from sdtrain.checkpoint.pieces import Pieces

NUM_STEPS = 30
REORDERED = str(Path(__file__).with_name("reordered.py"))
WAIT_SECONDS = 600
STAGES = ("autoencoder", "diffusion")
TRAINING = ["optim@autoencoder.optim=adamw", "optim@diffusion.optim=adamw", "autoencoder.objective.adversarial_start=5"]
for stage in STAGES:
    TRAINING += [f"{stage}.optim.lr=5e-5", f"{stage}.optim.warmup_steps=0", f"{stage}.trainer.clip_norm=0.3"]
    TRAINING += [f"{stage}.callback.checkpoint.every_steps=1", f"{stage}.callback.checkpoint.keep_last=100"]
    TRAINING += [f"{stage}.callback.checkpoint.in_background=false"]
    TRAINING += [f"{stage}.callback.log.every_steps=1"]
ACCUMULATE = [f"{stage}.trainer.num_accumulate=2" for stage in STAGES]
KINDS = {
    "one": [],
    **{f"control_{seed}": [] for seed in (1, 2, 3)},  # by `reordered.py`: another order of summation, and nothing else
    "accumulate": ACCUMULATE,
    "ddp": ["devices=2", "strategy=ddp"],
    "zero1": ["devices=2", "strategy=deepspeed_zero1"],
    "zero2_accumulate": ["devices=2", "strategy=deepspeed_zero2", *ACCUMULATE],
    "zero2_offload": ["devices=2", "strategy=deepspeed_zero2_offload"],
    "zero3": ["devices=2", "strategy=deepspeed_zero3"],
}


class Outcome:
    """What a run left, read as it is asked for."""

    def __init__(self, directory):
        self.directory = directory

    def rows(self, stage):
        rows = map(json.loads, (self.directory / "metrics.jsonl").read_text().splitlines())
        return {row["step"]: row for row in rows if row.get("stage") == stage and "loss" in row and "event" not in row}

    def losses(self, stage):
        return [row["loss"] for _, row in sorted(self.rows(stage).items())]

    def checkpoint(self, stage, step):
        return self.directory / stage / "checkpoints" / f"step_{step:08d}"

    def weights(self, stage, step=NUM_STEPS):
        return load_file(self.checkpoint(stage, step) / "model.safetensors")

    def gradients(self, stage):
        """Of the first step, as they were clipped: Adam's first moment is a tenth of them."""
        pieces, weights = Pieces(self.checkpoint(stage, 1)), self.weights(stage, 1)
        names = [name for name in weights if "exp_avg" in pieces.keys(name)]
        return torch.cat([pieces.read(name, "exp_avg", 0, weights[name].numel()) for name in names])


@pytest.fixture(scope="session")
def train_in_processes(command):
    """train_in_processes(directory, *overrides) -> what came of it; the words of `script` in place of `-m sdtrain`."""

    def train(directory, *overrides, script=("-m", "sdtrain")):
        # Lightning's launcher leaves these in the environment of whoever ran a fit in this process.
        arguments, options = command(directory, *TRAINING, *overrides)
        arguments[1:3] = script
        options["env"] = {k: v for k, v in options["env"].items() if k not in ("LOCAL_RANK", "NODE_RANK", "WORLD_SIZE")}
        process = subprocess.Popen(
            arguments, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, start_new_session=True, **options
        )
        try:
            said, _ = process.communicate(timeout=WAIT_SECONDS)
        finally:
            if process.poll() is None:
                os.killpg(process.pid, 9)
        assert process.returncode == 0, said[-3000:]
        return Outcome(directory)

    return train


@pytest.fixture(scope="session")
def train_here(train):
    """As `train_in_processes`, in this one."""
    return lambda directory, *overrides: Outcome(train(directory, *TRAINING, *overrides))


@pytest.fixture(scope="session")
def outcome(train_in_processes, tmp_path_factory):
    """outcome(kind, stage) -> a run of that stage that is done; stage 2 on the autoencoder of one process. Read it, and
    leave it as it is.
    """
    done = {}

    def get(kind, stage):
        if (kind, stage) not in done:
            directory = tmp_path_factory.mktemp(f"{kind}_{stage}") / "run"
            if stage == "diffusion":
                shutil.copytree(get("one", "autoencoder").directory, directory)
            overrides = [f"stages=[{stage}]", f"{stage}.trainer.max_steps={NUM_STEPS}", *KINDS[kind]]
            script = [REORDERED, kind[-1]] if kind.startswith("control") else ["-m", "sdtrain"]
            done[kind, stage] = train_in_processes(directory, *overrides, script=script)
        return done[kind, stage]

    return get


@pytest.fixture
def branch(outcome, tmp_path):
    """branch(kind, stage, step) -> a copy of a run as it stood at a step of a stage."""

    def make(kind, stage, step):
        directory = tmp_path / "run"
        shutil.copytree(outcome(kind, stage).directory, directory)
        for path in (directory / stage / "checkpoints").iterdir():
            if int(path.name[5:]) > step:
                shutil.rmtree(path)
        summary = json.loads((directory / "summary.json").read_text())
        del summary[stage]
        (directory / "summary.json").write_text(json.dumps(summary))
        return directory

    return make
