"""Who trains in a run directory, and when another may."""

import os
import signal
import subprocess
import sys

import pytest

from sdtrain.checkpoint import claim as module
from sdtrain.checkpoint.claim import claim
from sdtrain.errors import ConfigError

HOLD = """
import os, sys, time
from pathlib import Path
from sdtrain.checkpoint.claim import claim
file = claim(Path(sys.argv[1]))
worker = os.fork()  # which outlives its parent
print("held" if worker else "", worker, flush=True) if worker else None
time.sleep(60)
"""


@pytest.fixture
def holder(tmp_path):
    """A process that holds the directory, with a forked worker; both end with the test."""
    process = subprocess.Popen([sys.executable, "-c", HOLD, tmp_path], stdout=subprocess.PIPE, text=True)
    said, worker = process.stdout.readline().split()
    assert said == "held"
    yield process
    for pid in (process.pid, int(worker)):
        os.kill(pid, signal.SIGKILL)
    process.communicate()


def test_a_second_process_is_refused_and_told_which_is_there(holder, tmp_path, monkeypatch):
    monkeypatch.setattr(module, "_SAME_HOST_SECONDS", 0.2)
    with pytest.raises(ConfigError, match=f"is being trained by process {holder.pid} on .*; stop it first"):
        claim(tmp_path)


@pytest.mark.parametrize(("job", "attempt", "is_let_in"), [("71", "1", True), ("71", "0", False), ("72", "1", False)])
def test_a_requeued_job_passes_its_dead_node(tmp_path, monkeypatch, job, attempt, is_let_in):
    """The guard: some network file systems keep a dead node's locks until it is up again; a job's own steps, and
    another job, are refused as ever.
    """
    environment = os.environ | {"SLURM_JOB_ID": "71"}
    environment.pop("SLURM_RESTART_COUNT", None)
    hold = HOLD.replace("os.fork()", "1")
    with subprocess.Popen([sys.executable, "-c", hold, tmp_path], env=environment, stdout=subprocess.PIPE) as process:
        try:
            assert process.stdout.readline().startswith(b"held")
            monkeypatch.setenv("SLURM_JOB_ID", job)
            monkeypatch.setenv("SLURM_RESTART_COUNT", attempt)
            monkeypatch.setattr(module, "_SAME_HOST_SECONDS", 0.2)
            if is_let_in:
                assert claim(tmp_path) is None
            else:
                with pytest.raises(ConfigError, match="by process .* in job 71, attempt 0; stop it first"):
                    claim(tmp_path)
        finally:
            process.kill()


def test_of_another_machine_it_says_what_to_delete(holder, tmp_path, monkeypatch):
    monkeypatch.setattr(module, "_OTHER_HOST_SECONDS", 0.2)
    monkeypatch.setattr(module.socket, "gethostname", lambda: "elsewhere")
    with pytest.raises(ConfigError, match=f"if that machine is dead, delete {tmp_path}/lock"):
        claim(tmp_path)


def test_a_killed_process_holds_nothing_though_its_workers_live(holder, tmp_path):
    """The guard: a lock of the file, not of the process, is held by whoever was forked with it."""
    os.kill(holder.pid, signal.SIGKILL)
    file = claim(tmp_path)
    assert (tmp_path / "lock").read_text().startswith(f"process {os.getpid()} on ")
    file.close()


def test_one_that_is_done_lets_the_next_in(tmp_path, monkeypatch):
    claim(tmp_path).close()
    done = subprocess.run([sys.executable, "-c", HOLD.replace("time.sleep(60)", ""), tmp_path], capture_output=True)
    assert done.stdout.startswith(b"held"), done.stderr


def test_a_file_system_without_locks_is_gone_on_with(tmp_path, monkeypatch):
    def no_locks(*_):
        raise OSError(38, "Function not implemented")

    monkeypatch.setattr(module.fcntl, "lockf", no_locks)
    assert claim(tmp_path) is None
