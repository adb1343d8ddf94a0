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

from sdtrain.callback.guard import Guard, Note
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


def found(directory):
    return [json.loads(line) for line in (directory / "nonfinite.jsonl").read_text().splitlines()]


def test_a_nan_loss_is_named_with_its_step_and_samples(tmp_path):
    rows = Rows()
    with pytest.raises(RunError, match=r"not finite: loss at step 6; its samples are in .*nonfinite.jsonl") as raised:
        fit(tmp_path, max_steps=20, every_steps=5, module={"nan_at_sample": 22}, tracker=rows)
    assert raised.value.exit_code == 76
    row = {"stage": "toy", "step": 6, "what": "loss", "rank": 0, "action": "stop"}
    assert found(tmp_path) == [row | {"sample_id": [20, 21, 22, 23]}]
    assert [row for row in rows.rows if row["event"] != "checkpoint"] == [row | {"event": "nonfinite"}]
    assert newest(tmp_path).name == "step_00000005"
    assert_finite(newest(tmp_path))


@pytest.mark.parametrize("every_steps", [1, 2, 3])
def test_no_checkpoint_is_saved_after_it(tmp_path, every_steps):
    """The guard: the weights are looked at before a save, not a step late."""
    with pytest.raises(RunError, match="not finite: loss at step 3"):
        fit(tmp_path, every_steps=every_steps, keep_last=9, module={"nan_at_sample": 8})
    checkpoints = tmp_path / "toy" / "checkpoints"
    assert all(int(path.name[5:]) < 3 for path in checkpoints.glob("*"))


def test_an_infinite_gradient_in_the_step_that_would_be_saved(tmp_path):
    with pytest.raises(RunError, match="not finite: gradient of layer at step 4") as raised:
        fit(tmp_path, every_steps=2, module={"inf_gradient_at_step": 4})
    assert raised.value.exit_code == 76
    assert newest(tmp_path).name == "step_00000002"


class Overflow(Callback):
    def on_train_batch_end(self, trainer, pl_module, *args):
        if trainer.global_step == 4:
            torch.nn.init.constant_(pl_module.layer.bias, float("nan"))


def test_a_weight_is_looked_at_before_it_is_saved(tmp_path):
    with pytest.raises(RunError, match="not finite: parameter layer.bias at step 4"):
        fit(tmp_path, every_steps=4, fault=Overflow())
    assert not (tmp_path / "toy" / "checkpoints").exists()


def test_the_end_of_a_fit_is_checked_and_a_micro_batch_counts(tmp_path):
    with pytest.raises(RunError, match=r"not finite: loss at step 2"):
        fit(tmp_path, max_steps=2, accumulate=3, every_steps=100, module={"nan_at_sample": 17})
    assert found(tmp_path)[0]["sample_id"] == [*range(12, 24)]


def test_a_note_is_read_a_step_late(tmp_path, monkeypatch):
    """The guard: what the device just wrote is not waited for."""
    order, original = [], Note.bad
    monkeypatch.setattr(Note, "bad", lambda self: order.append(f"read {self.step}") or original(self))

    class Count(Callback):
        def on_train_batch_end(self, trainer, *args):
            order.append(f"done {trainer.global_step}")

    fit(tmp_path, max_steps=5, every_steps=100, fault=Count())
    assert order[:7] == ["done 1", "done 2", "read 1", "done 3", "read 2", "done 4", "read 3"]


@pytest.mark.parametrize("accumulate", [1, 2])
def test_a_skipped_step_changes_nothing(tmp_path, accumulate):
    """The guard: no optimizer takes notice of a gradient that is None."""
    states, bad = {}, 4 * 3 * accumulate  # in step 4

    class Look(Callback):
        def on_train_batch_end(self, trainer, pl_module, *args):
            tensors = [*pl_module.parameters(), *(t for s in trainer.optimizers[0].state.values() for t in s.values())]
            states[trainer.global_step] = [tensor.clone() for tensor in tensors]

    options = {"on_nonfinite": "skip", "accumulate": accumulate, "fault": Look(), "module": {"nan_at_sample": bad}}
    assert fit(tmp_path, **options).global_step == 8
    same = [all(map(torch.equal, states[step], states[step - 1])) for step in range(2, 9)]
    assert same == [False, False, True, False, False, False, False]
    (row,) = found(tmp_path)
    assert (row["step"], row["action"], row["sample_id"]) == (4, "skip", [*range(bad, bad + 4 * accumulate)])
    assert_finite(newest(tmp_path))


def test_too_many_skips_in_a_row_end_with_76(tmp_path):
    class Broken(Callback):
        def on_after_backward(self, trainer, pl_module):
            if trainer.global_step >= 3:
                pl_module.layer.bias.grad[0] = float("nan")

    with pytest.raises(RunError, match="gradient at step 9, and 5 steps before it were skipped") as raised:
        fit(tmp_path, max_steps=20, on_nonfinite="skip", fault=Broken())
    assert raised.value.exit_code == 76


def test_a_rollback_without_a_checkpoint_is_a_stop(tmp_path):
    with pytest.raises(RunError) as raised:
        fit(tmp_path, on_nonfinite="rollback", module={"nan_at_sample": 1})
    assert type(raised.value) is RunError
    assert raised.value.exit_code == 76


def test_bad_values():
    with pytest.raises(ConfigError, match="is stop, skip or rollback, not 'ignore'"):
        Guard("ignore")
    with pytest.raises(ConfigError, match="at least 1"):
        Guard("skip", 0)


@pytest.mark.slow
@pytest.mark.parametrize("on_nonfinite", ["stop", "skip"])
def test_all_ranks_act_together_when_one_meets_it(tmp_path, on_nonfinite):
    """The guard: the ranks agree; the loss of rank 1 alone is bad, and its gradients, which all share, are not."""
    options = {"directory": str(tmp_path), "devices": 2, "strategy": "ddp", "every_steps": 4}
    options |= {"on_nonfinite": on_nonfinite, "module": {"nan_at_sample": 17, "nan_rank": 1}, "compare_every": 1}
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, SCRIPT, json.dumps(options)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60)
    assert done.returncode == (76 if on_nonfinite == "stop" else 0), done.stderr
    (row,) = found(tmp_path)
    assert (row["step"], row["rank"], row["sample_id"]) == (5, 1, [16, 17, 18, 19] * 2)  # both see the same here
    assert newest(tmp_path).name == ("step_00000004" if on_nonfinite == "stop" else "step_00000008")
    assert_finite(newest(tmp_path))
