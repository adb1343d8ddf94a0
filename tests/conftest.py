"""Runs of both stages that take seconds: in this process, in one of their own, and one that is done and shared."""

import hashlib
import os
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]

# Everything that a run has, as small as it goes, in fp32.
SMALL = """
+experiment=smoke accelerator=cpu precision=32-true tracker=none sampler.num_steps=2
data.num_train=64 data.num_val=16 data.num_held_out=8
first_stage.block_out_channels=[8,8,8] first_stage.norm_num_groups=4
model.block_out_channels=[32,32] model.norm_num_groups=8 model.attention_head_dim=[1,1]
conditioner.width=32 conditioner.num_heads=1 conditioner.num_layers=1
autoencoder.recognition.network.widths=[[8],[8]]
autoencoder.recognition.trainer.max_steps=1 autoencoder.recognition.trainer.batch_size=8
autoencoder.objective.discriminator.width=8 autoencoder.objective.adversarial_start=2
autoencoder.trainer.max_steps=4 autoencoder.trainer.batch_size=8
autoencoder.optim.lr=1e-2 autoencoder.optim.warmup_steps=0 autoencoder.optim.decay=constant
autoencoder.callback.checkpoint.every_steps=2
diffusion.trainer.max_steps=4 diffusion.trainer.batch_size=8
diffusion.optim.lr=1e-2 diffusion.optim.warmup_steps=0 diffusion.optim.decay=constant
diffusion.callback.checkpoint.every_steps=2
diffusion.metric.caption_match.num_captions=2
""".split()

# Without what looks at the weights and does not change them.
BLIND = [
    f"{stage}.callback.{name}=null" for stage in ("autoencoder", "diffusion") for name in ("samples", "evaluate", "mfu")
] + ["diffusion.metric.caption_match=null", "diffusion.metric.memorisation=null"]


@pytest.fixture(scope="session")
def small(tmp_path_factory):
    """The overrides of a small run, over one set of shapes; those that come after them win."""
    return [*SMALL, f"data.root={tmp_path_factory.mktemp('shapes')}"]


@pytest.fixture(scope="session")
def train(small):
    """train(directory, *overrides) in this process -> the directory."""

    def train_here(directory, *overrides, blind=True, base=small):
        import torch

        from sdtrain.config import load_config
        from sdtrain.run import run

        torch.set_num_threads(1)  # as the processes below: another number of threads is another order of sums
        assert run(load_config([*base, *(BLIND if blind else ()), f"output_dir='{directory}'", *overrides])) == 0
        return Path(directory)

    return train_here


@pytest.fixture(scope="session")
def command(small):
    """command(directory, *overrides) -> the arguments and options of a process that runs `python -m sdtrain`."""

    def make(directory, *overrides):
        environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
        arguments = [sys.executable, "-m", "sdtrain", *small, *BLIND, f"output_dir='{directory}'", *overrides]
        return arguments, {"cwd": ROOT, "env": environment, "text": True}

    return make


@pytest.fixture(scope="session")
def finished(train, tmp_path_factory):
    """A run of both stages that is done, with all its figures and pictures. Read it, and leave it as it is."""
    return train(tmp_path_factory.mktemp("runs") / "finished", blind=False)


@pytest.fixture(scope="session")
def whole(train, tmp_path_factory):
    """What `train` makes when nothing happens to it: the run that others must equal. Leave it as it is, too."""
    return train(tmp_path_factory.mktemp("runs") / "whole")


@pytest.fixture(scope="session")
def hashes():
    """hashes(directory) -> sha256 of the weights in the newest checkpoint of each stage, raw and averaged."""

    def read(directory, stages=("autoencoder", "diffusion")):
        files = {}
        for stage in stages:
            newest = max((Path(directory) / stage / "checkpoints").iterdir())
            for name in ("model.safetensors", "ema.safetensors"):
                files[f"{stage}/{newest.name}/{name}"] = hashlib.sha256((newest / name).read_bytes()).hexdigest()
        return files

    return read
