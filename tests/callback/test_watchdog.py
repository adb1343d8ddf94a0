"""A rank that stands still ends the run with 77, its name and the stacks of all; a slow phase does not."""

import json
import os
import runpy
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import pytest
from lightning.pytorch import Callback

from sdtrain.callback.log import off_the_clock
from sdtrain.callback.watchdog import Watchdog, culprits
from sdtrain.errors import ConfigError

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "tests" / "fault" / "toy_run.py"
toy = runpy.run_path(str(SCRIPT))
fit, fit_in_child = toy["fit"], toy["fit_in_child"]


def beat(step, phase, time=100.0):
    return {"step": step, "phase": phase, "time": time}


@pytest.mark.parametrize(
    ("beats", "found"),
    [
        ([beat(4, "backward"), beat(4, "backward", 40.0)], [1]),  # stopped, or its machine is gone
        ([beat(4, "backward"), None], [1]),
        ([beat(4, "backward"), beat(4, "next batch"), beat(4, "backward")], [1]),  # waits for its data
        ([beat(4, "backward"), beat(4, "next batch")], [1]),
        ([beat(4, "backward"), beat(4, "save")], [0]),
        ([beat(4, "backward"), beat(5, "backward")], [1]),  # went past what the other waits in
        ([beat(4, "backward"), beat(5, "forward"), beat(4, "backward"), beat(4, "backward")], [1]),
        ([beat(4, "backward")] * 3, []),
    ],
)
def test_the_culprit(beats, found):
    assert culprits(dict(enumerate(beats)), 50.0) == found


def test_bad_values():
    for values in [(0, 1), (2, 1)]:
        with pytest.raises(ConfigError, match="at most slow_timeout_seconds"):
            Watchdog(*values)


class Sleep(Callback):
    """Long enough for a watchdog of 0.3 s, where `phase` is given inside of one that may take longer."""

    def __init__(self, phase=None):
        self.phase = phase

    def on_train_batch_end(self, trainer, pl_module, *args):
        if trainer.global_step == 3 and self.phase:
            with off_the_clock(trainer, self.phase):
                time.sleep(2.0)
        elif trainer.global_step == 3:
            time.sleep(2.0)


def test_a_slow_phase_is_no_hang_and_the_heartbeat_says_where_a_rank_is(tmp_path):
    """The guard: saves and figures have their own limit."""
    fit(tmp_path, hang_seconds=1.0, fault=Sleep("validation"))
    last = json.loads((tmp_path / "heartbeat" / "rank0.json").read_text())
    assert (last["step"], last["phase"]) == (8, "ended")
    assert abs(last["time"] - time.time()) < 5
    assert not (tmp_path / "exit.json").exists()


def test_a_step_that_takes_too_long_ends_with_77_and_its_stacks(tmp_path):
    assert fit_in_child(directory=tmp_path, hang_seconds=1.0, fault=Sleep()) == 77
    said = json.loads((tmp_path / "exit.json").read_text())
    assert said["exit_code"] == 77
    assert said["reason"].startswith("hang: all ranks stand at the same place; rank 0 has made no progress for 1 s")
    stacks = (tmp_path / "logs" / "rank0.stacks.txt").read_text()
    assert "test_watchdog.py" in stacks
    assert "on_train_batch_end" in stacks


def test_a_process_that_was_stopped_and_goes_on_does_not_hang(tmp_path):
    """The guard: Ctrl-Z and fg. The thread counts the time that it was awake."""

    class Pause(Callback):
        def on_train_batch_start(self, trainer, *args):
            if trainer.global_step == 3:
                time.sleep(0.2)  # for the thread to see where it stands
                if (pid := os.fork()) == 0:
                    time.sleep(3.0)
                    os.kill(os.getppid(), signal.SIGCONT)
                    os._exit(0)
                os.kill(os.getpid(), signal.SIGSTOP)
                os.waitpid(pid, 0)
                time.sleep(0.2)  # for the thread to look at it

    assert fit_in_child(directory=tmp_path, hang_seconds=1.5, fault=Pause()) == 0


HANGS = {
    "stopped": ({"signal_number": signal.SIGSTOP, "at_batch": 4, "rank": 1}, "hang: rank 1 (last heard of "),
    "the first one stopped": ({"signal_number": signal.SIGSTOP, "at_batch": 4}, "rank 1: hang: rank 0 (last heard of "),
    "asleep": ({"does": "sleep", "at_batch": 4, "rank": 1}, "hang: rank 1 (forward of step 4)"),
    "past a collective": ({"does": "unsync", "at_batch": 4, "rank": 1}, "hang: rank 1 (next batch of step 5)"),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", HANGS)
def test_a_rank_that_holds_up_the_other_is_named_and_both_are_gone(tmp_path, name):
    fault, expected = HANGS[name]
    options = {"directory": str(tmp_path), "devices": 2, "strategy": "ddp", "every_steps": 100, "hang_seconds": 2}
    command = [sys.executable, SCRIPT, json.dumps(options | {"fault": fault})]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    process = subprocess.Popen(command, env=environment, start_new_session=True, **pipes)
    try:
        printed, _ = process.communicate(timeout=90)  # the pipe closes with the last rank
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
    said = json.loads((tmp_path / "exit.json").read_text())
    assert said["exit_code"] == 77, printed
    assert said["reason"].startswith(expected), said
    assert process.returncode == (-signal.SIGKILL if name == "the first one stopped" else 77)
    stacks = {path.name for path in (tmp_path / "logs").iterdir()}
    assert stacks >= {f"rank{1 if name == 'the first one stopped' else 0}.stacks.txt"}


@pytest.mark.slow
def test_a_rank_that_fails_alone_ends_the_other_with_its_code(tmp_path):
    """The guard: the first rank looks for the ends of others, since its collective would wait for half an hour."""
    options = {"directory": str(tmp_path), "devices": 2, "strategy": "ddp", "hang_seconds": 20}
    fault = {"does": "raise", "at_batch": 4, "rank": 1}
    command = [sys.executable, SCRIPT, json.dumps(options | {"fault": fault})]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60)
    assert done.returncode == 2, done.stderr
    said = json.loads((tmp_path / "exit.json").read_text())
    assert said == {"exit_code": 2, "reason": "rank 1: this rank's disk is gone"}
    assert "error: rank 1: this rank's disk is gone" in done.stderr  # which is the watchdog's own line
