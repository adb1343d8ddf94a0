"""Weights that differ between ranks end the run with 78, before they are saved."""

import json
import os
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from sdtrain.callback.divergence import bit_sums, differing
from sdtrain.checkpoint.commit import newest_valid

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "tests" / "fault" / "toy_run.py"
fit = runpy.run_path(str(SCRIPT))["fit"]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_one_bit_changes_the_sum(dtype):
    tensor = torch.randn(3, 5, 7, 7).to(dtype, memory_format=torch.channels_last)
    other = tensor.clone()
    other[1, 2, 3, 4] = torch.nextafter(other[1, 2, 3, 4].float() * 1.01, torch.tensor(9.0)).to(dtype)
    assert bit_sums([tensor]).equal(bit_sums([tensor.clone()]))
    assert not bit_sums([tensor]).equal(bit_sums([other]))
    ulp = torch.tensor([1.0])
    assert not bit_sums([ulp]).equal(bit_sums([torch.nextafter(ulp, torch.tensor([2.0]))]))


def test_the_ranks_that_are_not_like_most():
    assert differing([(1, 2), (1, 2), (1, 3), (1, 2)]) == [2]
    assert differing([(1,), (2,)]) == [1]
    assert differing([(1,), (2,), (2,)]) == [0]


def test_one_process_has_nobody_to_differ_from(tmp_path):
    assert fit(tmp_path, compare_every=1).global_step == 8


@pytest.mark.slow
@pytest.mark.parametrize("drifts", [False, True])
def test_a_rank_that_drifts_is_found_at_the_next_look(tmp_path, drifts):
    """The guard: a weight of rank 1 is moved by 1e-6 in step 3; without it there is no alarm, nor of a straggler."""
    options = {"directory": str(tmp_path), "devices": 2, "strategy": "ddp", "compare_every": 4, "every_steps": 2}
    if drifts:
        options["fault"] = {"does": "drift", "at_batch": 3, "rank": 1}
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, SCRIPT, json.dumps(options)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60)
    assert done.returncode == (78 if drifts else 0), done.stderr
    said = json.loads((tmp_path / "exit.json").read_text())
    expected = "the ranks diverged: at step 4 rank 1 has other weights, layer.bias first" if drifts else "done"
    assert said["reason"].startswith(expected)
    newest = newest_valid(tmp_path / "toy" / "checkpoints")[0].name
    assert newest == ("step_00000002" if drifts else "step_00000008")  # step 4's were looked at before they were saved
