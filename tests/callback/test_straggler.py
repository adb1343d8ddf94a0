"""The slowest rank is named by what it does itself, not by what it waits for."""

import json
import os
import runpy
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from sdtrain.callback.straggler import Straggler

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "tests" / "fault" / "toy_run.py"
Rows = runpy.run_path(str(SCRIPT))["Rows"]


@pytest.mark.parametrize(
    ("seconds", "step_seconds", "named"),
    [
        ([1.0, 1.1, 1.7, 1.0], 4.0, [2]),
        ([1.0, 1.1, 1.4, 1.0], 4.0, []),  # less than 1.5 times the median
        ([0.01, 0.01, 0.05, 0.01], 4.0, []),  # less than a tenth of the step
        ([0.5, 1.0], 2.0, [1]),
    ],
)
def test_who_is_named(seconds, step_seconds, named, capsys):
    rows = Rows()
    module = SimpleNamespace(context=SimpleNamespace(stage="toy", tracker=rows))
    trainer = SimpleNamespace(lightning_module=module, global_step=50)
    Straggler()._tell(trainer, seconds, step_seconds)
    assert [row["rank"] for row in rows.rows] == named
    assert [f"slow: rank {rank} takes" in capsys.readouterr().out for rank in named] == [True] * len(named)


@pytest.mark.slow
def test_the_slow_one_of_two_processes(tmp_path):
    """The guard: rank 1 sleeps 50 ms in every forward; the steps of both take as long."""
    options = {"directory": str(tmp_path), "devices": 2, "strategy": "ddp", "max_steps": 12, "every_steps": 100}
    options |= {"module": {"slow_rank": 1}, "compare_every": 5}
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, SCRIPT, json.dumps(options)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    lines = [line for line in done.stdout.splitlines() if line.startswith("slow: ")]
    assert lines
    assert all(line.startswith("slow: rank 1 takes ") for line in lines)
