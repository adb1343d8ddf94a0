"""A loss or gradient that is not finite ends the fit with 76, and no checkpoint holds its trace."""

import json
import os
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from lightning.pytorch import Callback

from sdtrain.callback.guard import Guard
from sdtrain.checkpoint.commit import newest_valid
from sdtrain.checkpoint.files import read
from sdtrain.errors import ConfigError, RunError

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "tests" / "fault" / "toy_run.py"
toy = runpy.run_path(str(SCRIPT))
fit, Rows = toy["fit"], toy["Rows"]


def newest(directory):
    return newest_valid(directory / "toy" / "checkpoints")[0]


def assert_finite(path):
    for tensor in read(path)["state_dict"].values():
        assert tensor.isfinite().all()


def test_a_nan_loss_is_named_with_its_step_and_samples(tmp_path):
    rows = Rows()
    message = r"not finite: loss at step 6 \(steps 6 to 8 were checked together\); samples \[20, 21, 22, 23\]"
    with pytest.raises(RunError, match=message) as raised:
        fit(tmp_path, max_steps=20, every_steps=5, check_every_steps=3, module={"nan_at_sample": 22}, tracker=rows)
    assert raised.value.exit_code == 76
    report = json.loads((tmp_path / "toy" / "nonfinite.json").read_text())
    assert report == {"stage": "toy", "step": 6, "what": "loss", "window": [6, 8], "sample_id": [20, 21, 22, 23]}
    assert rows.rows == [{"stage": "toy", "step": 6, "event": "nonfinite", "what": "loss"}]
    assert newest(tmp_path).name == "step_00000005"
    assert_finite(newest(tmp_path))


@pytest.mark.parametrize("every_steps", [1, 2, 3])
def test_no_checkpoint_is_saved_after_it_however_rare_the_checks(tmp_path, every_steps):
    with pytest.raises(RunError, match="not finite: loss at step 3"):
        fit(tmp_path, every_steps=every_steps, keep_last=9, check_every_steps=1000, module={"nan_at_sample": 8})
    checkpoints = tmp_path / "toy" / "checkpoints"
    assert all(int(path.name[5:]) < 3 for path in checkpoints.glob("*"))


def test_an_infinite_gradient_in_the_step_that_would_be_saved(tmp_path):
    with pytest.raises(RunError, match="not finite: gradient at step 4") as raised:
        fit(tmp_path, every_steps=2, check_every_steps=1000, module={"inf_gradient_at_step": 4})
    assert raised.value.exit_code == 76
    assert newest(tmp_path).name == "step_00000002"


def test_a_weight_is_looked_at_before_it_is_saved(tmp_path):
    class Overflow(Callback):
        def on_train_batch_end(self, trainer, pl_module, *args):
            if trainer.global_step == 4:
                torch.nn.init.constant_(pl_module.layer.bias, float("nan"))

    with pytest.raises(RunError, match="not finite: parameter layer.bias at step 4"):
        fit(tmp_path, every_steps=4, fault=Overflow())
    assert not (tmp_path / "toy" / "checkpoints").exists()


def test_the_end_of_a_fit_is_checked_and_a_micro_batch_counts(tmp_path):
    with pytest.raises(
        RunError, match=r"not finite: loss at step 2 .* samples .12, 13, 14, 15, 16, 17, 18, 19\]\.\.\., all"
    ):
        fit(tmp_path, max_steps=2, accumulate=3, every_steps=100, module={"nan_at_sample": 17})


def test_a_healthy_fit_reads_its_notes_only_when_due(tmp_path, monkeypatch):
    checks = []
    monkeypatch.setattr(Guard, "_check", lambda self, trainer: checks.append(trainer.global_step))
    fit(tmp_path, max_steps=7, every_steps=100, check_every_steps=1000)
    assert checks == [7, 7]  # the save at the end, and the end


def test_bad_values():
    with pytest.raises(ConfigError, match="at least 1"):
        Guard(0)


@pytest.mark.slow
def test_all_ranks_stop_when_one_meets_it(tmp_path):
    options = {"directory": str(tmp_path), "devices": 2, "strategy": "ddp", "check_every_steps": 2, "every_steps": 2}
    options["module"] = {"nan_at_sample": 17, "nan_rank": 1}
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, SCRIPT, json.dumps(options)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60)
    assert done.returncode == 76, done.stderr
    assert json.loads((tmp_path / "toy" / "nonfinite_rank1.json").read_text())["sample_id"] == [16, 17, 18, 19]
    assert newest(tmp_path).name == "step_00000004"
    assert_finite(newest(tmp_path))
