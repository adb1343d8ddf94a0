"""Signals, the time limit and the STOP file end a fit at a step boundary, saved, with 75."""

import json
import os
import runpy
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest
from lightning.pytorch import Callback

from sdtrain.callback import ending
from sdtrain.checkpoint.commit import newest_valid, read_manifest
from sdtrain.errors import RunError

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "tests" / "fault" / "toy_run.py"
toy = runpy.run_path(str(SCRIPT))
fit, fit_in_child, state_hash, Rows = toy["fit"], toy["fit_in_child"], toy["state_hash"], toy["Rows"]
LIMITED = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)


def newest(directory):
    return newest_valid(directory / "toy" / "checkpoints")[0].name


@pytest.mark.parametrize("number", LIMITED, ids=lambda number: number.name)
def test_a_signal_saves_at_the_step_boundary_and_leaves_with_75(tmp_path, number):
    fault = {"signal_number": number, "at_batch": 8}  # the second of three micro-batches of step 3
    assert fit_in_child(directory=tmp_path, accumulate=3, every_steps=100, fault=fault) == 75
    assert newest(tmp_path) == "step_00000003"
    whole = state_hash(fit(tmp_path / "whole", accumulate=3))
    assert state_hash(fit(tmp_path, accumulate=3, resume="must")) == whole


def test_a_second_ctrl_c_leaves_at_once(tmp_path):
    class Impatient(Callback):
        def on_train_batch_start(self, *args):
            for _ in range(2):
                os.kill(os.getpid(), signal.SIGINT)

    assert fit_in_child(directory=tmp_path, fault=Impatient()) not in (0, 75)
    assert not (tmp_path / "toy" / "checkpoints").exists()


def test_the_stop_file_is_honoured_once(tmp_path):
    (tmp_path / "STOP").touch()
    rows = Rows()
    with pytest.raises(RunError, match="^stopped by the STOP file at step 1; continue with: ") as raised:
        fit(tmp_path, tracker=rows)
    assert raised.value.exit_code == 75
    assert rows.rows[-1] == {"stage": "toy", "step": 1, "images": 4, "event": "stop", "reason": "the STOP file"}
    assert newest(tmp_path) == "step_00000001"
    assert not (tmp_path / "STOP").exists()
    assert fit(tmp_path).global_step == 8


def test_the_time_limit(tmp_path):
    with pytest.raises(RunError, match="stopped by the time limit at step 1") as raised:
        fit(tmp_path, time_limit_seconds=0.001)
    assert raised.value.exit_code == 75
    assert fit(tmp_path, time_limit_seconds=3600).global_step == 8


def test_a_signal_in_the_last_step_is_not_lost(tmp_path):
    assert fit_in_child(directory=tmp_path, max_steps=2, fault={"signal_number": signal.SIGTERM, "at_batch": 2}) == 75
    assert newest(tmp_path) == "step_00000002"


@pytest.mark.parametrize("stopped", [False, True])
def test_the_handlers_are_put_back(tmp_path, stopped):
    before = [signal.getsignal(number) for number in LIMITED]
    if stopped:
        (tmp_path / "STOP").touch()
        with pytest.raises(RunError):
            fit(tmp_path)
    else:
        fit(tmp_path)
    assert [signal.getsignal(number) for number in LIMITED] == before


@pytest.mark.parametrize(
    ("number", "marker"), [(signal.SIGUSR1, "REQUEUE"), (signal.SIGTERM, "STOPPED"), (signal.SIGINT, "STOPPED")]
)
def test_under_slurm_a_marker_says_whether_to_come_back(tmp_path, monkeypatch, number, marker):
    """The guard: slurm/job.sh requeues what left REQUEUE."""
    fault = {"signal_number": number, "at_batch": 2}
    assert fit_in_child(directory=tmp_path, fault=fault) == 75
    assert not list(tmp_path.glob("[A-Z]*"))
    monkeypatch.setenv("SLURM_JOB_ID", "1")
    assert fit_in_child(directory=tmp_path, fault=fault) == 75
    assert [path.name for path in tmp_path.glob("[A-Z]*")] == [marker]
    ending.forget(tmp_path)
    assert not list(tmp_path.glob("[A-Z]*"))


def test_a_worker_that_was_forked_leaves_the_flag_alone(tmp_path):
    """The guard: Slurm signals every process of a job, and a forked worker inherits the handlers."""

    class Forked(Callback):
        def on_train_batch_start(self, *args):
            if (pid := os.fork()) == 0:
                os.kill(os.getpid(), signal.SIGINT)
                os.kill(os.getpid(), signal.SIGINT)  # the second one would raise
                os._exit(0)
            assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0

    assert fit_in_child(directory=tmp_path, max_steps=2, fault=Forked()) == 0


def test_a_fit_off_the_main_thread_runs_without_handlers(tmp_path):
    steps = []
    thread = threading.Thread(target=lambda: steps.append(fit(tmp_path).global_step))
    thread.start()
    thread.join()
    assert steps == [8]


def run_script(*, timeout_seconds=60, **options):
    command = [sys.executable, SCRIPT, json.dumps(options)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=timeout_seconds)


@pytest.mark.slow
def test_a_process_of_its_own_says_the_next_command(tmp_path):
    fault = {"signal_number": signal.SIGTERM, "at_batch": 3}
    done = run_script(directory=str(tmp_path), fault=fault)
    assert done.returncode == 75, done.stderr
    last = done.stdout.splitlines()[-1]
    assert last.startswith("stopped by SIGTERM at step 3; continue with: ")
    assert str(SCRIPT) in last


@pytest.mark.slow
@pytest.mark.parametrize("rank", [0, 1])
def test_two_ranks_stop_together_whichever_is_told(tmp_path, rank):
    fault = {"signal_number": signal.SIGTERM, "at_batch": 3, "rank": rank}
    ddp = {"directory": str(tmp_path), "devices": 2, "strategy": "ddp"}
    done = run_script(**ddp, fault=fault)
    assert done.returncode == 75, done.stderr
    assert newest(tmp_path) == "step_00000004"  # the ranks agree a step late
    assert "stopped by SIGTERM at step 4" in done.stdout  # also where it was another rank that was told
    done = run_script(**ddp, resume="must")
    assert done.returncode == 0, done.stderr
    assert read_manifest(tmp_path / "toy" / "checkpoints" / "step_00000008")["world_size"] == 2
    assert f"hash {state_hash(fit(tmp_path / 'whole'))}" in done.stdout  # both ranks see the same data in this toy
