"""A batch that is no number is left out, or gone round, on two ranks of ZeRO as on one process: the same training."""

import json
import runpy
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from sdtrain.stage.base import Stage

pytestmark = pytest.mark.slow

SCRIPT = Path(__file__).with_name("poisoned.py")
POISON = {"autoencoder": 30, "diffusion": 30}  # in the fourth step of each stage
NUM_STEPS = 7
POLICIES = {
    "left out, then gone round": {"autoencoder": "skip", "diffusion": "rollback"},
    "gone round, then left out": {"autoencoder": "rollback", "diffusion": "skip"},
}
ZERO = {
    "left out, then gone round": ["strategy=deepspeed_zero2", "autoencoder.trainer.num_accumulate=2"],
    "gone round, then left out": ["strategy=deepspeed_zero1"],
}


def last_losses(outcome, stage):
    """Of each step, as it was done last; a step that was left out has none."""
    return [loss for loss in outcome.losses(stage) if loss is not None]


def found(outcome):
    """The line of each stage, and the samples that a rollback passed over."""
    rows = map(json.loads, (outcome.directory / "nonfinite.jsonl").read_text().splitlines())
    passed = [path.read_text() for path in outcome.directory.glob("*/rollback.jsonl")]
    return [(row["stage"], row["step"], row["action"], sorted(row["sample_id"])) for row in rows], passed


@pytest.mark.parametrize("policy", POLICIES)
def test_as_on_one_process(train_here, train_in_processes, monkeypatch, tmp_path, policy):
    """The guards: the ranks decide together, before the optimizer steps, by the norm of pieces that all ranks have; no
    checkpoint is saved of a step that ZeRO-3 itself left out; averages and schedule do not count it.
    """
    options = []
    for stage, action in POLICIES[policy].items():
        options += [f"{stage}.callback.guard.on_nonfinite={action}", f"{stage}.trainer.max_steps={NUM_STEPS}"]
        options += [f"{stage}.callback.checkpoint.every_steps=2"]
    monkeypatch.setenv("SDTRAIN_POISON", json.dumps(POISON))
    spread = ["devices=2", *ZERO[policy], "+strategy@diffusion.strategy=deepspeed_zero3"]
    two = train_in_processes(tmp_path / "two", *options, *spread, script=[SCRIPT])
    monkeypatch.setattr(Stage, "consumed", runpy.run_path(str(SCRIPT))["poisoned"](Stage.consumed, POISON))
    one = train_here(tmp_path / "one", *options)
    assert found(two) == found(one)
    assert [row[1:3] for row in found(one)[0]] == [(4, action) for action in POLICIES[policy].values()]
    for stage, action in POLICIES[policy].items():
        assert len(last_losses(one, stage)) == (NUM_STEPS - 1 if action == "skip" else NUM_STEPS)
        assert last_losses(two, stage) == pytest.approx(last_losses(one, stage), rel=1e-5)
        averages = [load_file(run.checkpoint(stage, NUM_STEPS) / "ema.safetensors") for run in (two, one)]
        assert {int(average.pop("num_updates")) for average in averages} == {len(last_losses(one, stage))}
        flat = [torch.cat([average[name].flatten() for name in sorted(average)]) for average in averages]
        assert float((flat[0] - flat[1]).norm() / flat[1].norm()) < 1e-5
