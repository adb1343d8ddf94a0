"""How the ranks of a run tell each other, and a launcher, that it is over."""

import errno
import json
import os
import shlex
import signal
import sys
import time
from contextlib import suppress
from functools import partial
from pathlib import Path

import pytest
import torch

from sdtrain.callback import ending
from sdtrain.errors import ConfigError, RunError


@pytest.fixture(autouse=True)
def _impatient(monkeypatch):
    monkeypatch.setattr(ending, "GRACE_SECONDS", 0.2)


def end(directory, failure=None, rank=0):
    """What comes out of `recorded`, and whether it called `finish`."""
    finished = []
    try:
        with ending.recorded(directory, rank, lambda: finished.append(True)):
            if failure is not None:
                raise failure
    except BaseException as error:
        return error, bool(finished)
    return None, bool(finished)


def read(directory, name="exit.json"):
    return json.loads((directory / name).read_text())


@pytest.mark.parametrize(
    ("failure", "code", "reason"),
    [
        (None, 0, "done"),
        (RunError("stopped by SIGTERM\nmore", 75), 75, "stopped by SIGTERM"),
        (ConfigError("no such key"), 2, "no such key"),
        (KeyboardInterrupt(), 75, "Ctrl-C"),
        (ValueError("a bug"), 1, "crashed: ValueError: a bug"),
    ],
)
def test_the_first_rank_says_how_it_ended(tmp_path, failure, code, reason):
    assert end(tmp_path, failure) == (failure, failure is not None)
    assert read(tmp_path) == {"exit_code": code, "reason": reason}


def test_another_rank_leaves_with_0_once_the_first_holds_the_code(tmp_path):
    """The guard: Lightning's observer would kill the first rank."""
    ending.tell(tmp_path, 76, "not finite")
    error, _ = end(tmp_path, RunError("not finite", 76), rank=1)
    assert (type(error), error.code) == (SystemExit, 0)
    assert read(tmp_path)["exit_code"] == 76


def test_a_rank_that_fails_alone_speaks_for_the_run_when_the_first_one_cannot(tmp_path):
    failure = ValueError("a bug")
    assert end(tmp_path, failure, rank=3)[0] is failure
    assert read(tmp_path)["exit_code"] == 1
    assert read(tmp_path)["reason"].startswith("rank 3: crashed: ValueError: a bug; its traceback is in ")
    assert "ValueError: a bug" in (tmp_path / "logs" / "rank3.traceback.txt").read_text()


def test_the_first_rank_takes_the_cause_from_the_rank_that_had_it(tmp_path):
    """The guard: a lost connection is never the cause."""
    ending.tell(tmp_path, 2, "its disk is gone", rank=1)
    error, _ = end(tmp_path, RuntimeError("[../gloo/transport/tcp/pair.cc:1] Connection closed by peer"))
    assert (str(error), error.exit_code) == ("rank 1: its disk is gone", 2)
    assert read(tmp_path) == {"exit_code": 2, "reason": "rank 1: its disk is gone"}
    error, _ = end(tmp_path, ValueError("its own"))
    assert read(tmp_path)["reason"] == "crashed: ValueError: its own"


def test_a_rank_that_lost_the_first_one_does_not_take_the_blame(tmp_path):
    end(tmp_path, torch.distributed.DistBackendError("NCCL"), rank=1)
    assert not (tmp_path / "exit_rank1.json").exists()
    assert read(tmp_path)["reason"].startswith("rank 1: crashed: DistBackendError")


def test_a_row_that_finds_the_disk_full_is_a_line_and_not_a_bug(tmp_path, monkeypatch):
    """The guard: DIR/exit.json does not fit either, and hid the reason."""
    full = OSError(errno.ENOSPC, "No space left on device")

    def write_text(*_):
        raise full

    monkeypatch.setattr(Path, "write_text", write_text)

    def finish():
        asked.append(True)
        raise full  # of the row that is still in the file's buffer

    asked = []
    with pytest.raises(ConfigError) as raised, ending.recorded(tmp_path, 0, finish):
        raise full
    error = raised.value
    assert str(error).startswith(f"cannot write in {tmp_path}: No space left on device (")
    assert "bytes free); the checkpoints are intact" in str(error)
    assert asked
    assert error.__cause__ is full
    assert not any(tmp_path.iterdir())
    missing = OSError(errno.ENOENT, "No such file or directory")
    assert end(tmp_path, missing)[0] is missing


def test_what_continues_a_run_does_not_begin_it_anew(monkeypatch):
    typed = ["python", "-m", "sdtrain", "+experiment=smoke", "resume=never", "name='a b'"]
    monkeypatch.setattr(sys, "orig_argv", typed)
    assert shlex.split(ending.next_command()) == [*typed[:4], typed[5]]
    monkeypatch.setattr(sys, "orig_argv", [*typed, "cluster.submitted=0123"])  # typed by nobody
    assert ending.next_command().startswith("slurm/submit.py as it was sent")


def test_what_an_attempt_left_is_forgotten(tmp_path):
    ending.tell(tmp_path, 1, "")
    ending.tell(tmp_path, 1, "", rank=7)
    ending.write_json(tmp_path / "heartbeat" / "rank0.json", {})
    (tmp_path / "REQUEUE").touch()
    (tmp_path / "config.yaml").touch()
    ending.forget(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["config.yaml"]


@pytest.mark.parametrize("number", ending.SIGNALS)
def test_outside_of_a_fit_a_signal_ends_the_run_where_it_stands(tmp_path, number):
    before = [signal.getsignal(n) for n in ending.SIGNALS]

    def run():
        with ending.recorded(tmp_path, 0, lambda: None):
            os.kill(os.getpid(), number)
            time.sleep(5)

    with pytest.raises(RunError, match=f"stopped by {number.name} between two steps; continue with: ") as raised:
        run()
    assert raised.value.exit_code == 75
    assert read(tmp_path)["exit_code"] == 75
    assert [signal.getsignal(n) for n in ending.SIGNALS] == before


def test_what_excuses_failures_excuses_no_stop(tmp_path):
    """The guard: a signal while a part was imported was that part's mistake, and ended the run with 2."""

    def run():
        with ending.recorded(tmp_path, 0, lambda: None), suppress(Exception):
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(5)

    with pytest.raises(RunError, match="^stopped by SIGTERM between two steps") as raised:
        run()
    assert raised.value.exit_code == 75
    assert read(tmp_path)["exit_code"] == 75


def test_a_run_that_ends_is_not_ended_again(tmp_path):
    """The guard: Slurm sends TERM more than once, and the second one must not cut the end."""
    for number in (signal.SIGTERM, signal.SIGUSR1):
        finish = partial(os.kill, os.getpid(), number)
        with pytest.raises(RunError, match="^stopped by SIGTERM at step 3"), ending.recorded(tmp_path, 0, finish):
            raise RunError("stopped by SIGTERM at step 3", 75)


@pytest.mark.parametrize(
    ("environment", "rank"),
    [
        ({}, 0),
        ({"LOCAL_RANK": "1"}, 1),
        ({"SLURM_NTASKS": "4", "SLURM_JOB_NAME": "a", "SLURM_PROCID": "3", "LOCAL_RANK": "0"}, 3),
        ({"SLURM_NTASKS": "1", "SLURM_JOB_NAME": "bash", "SLURM_PROCID": "0", "LOCAL_RANK": "1"}, 1),
        ({"SLURM_NTASKS": "2", "SLURM_PROCID": "0", "TORCHELASTIC_RUN_ID": "x", "RANK": "5", "LOCAL_RANK": "1"}, 5),
    ],
)
def test_the_rank_is_that_of_the_launcher_that_started_it(monkeypatch, environment, rank):
    """The guard: a batch script's own SLURM_PROCID is 0, and what it starts inherits it."""
    for name in ("RANK", "LOCAL_RANK", "NODE_RANK", "SLURM_NTASKS", "SLURM_PROCID", "TORCHELASTIC_RUN_ID"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert ending.global_rank() == rank
