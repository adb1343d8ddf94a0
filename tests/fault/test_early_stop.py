"""A signal between the start of the process and the first step of its run: 75 as later, nothing lost, no traceback."""

import contextlib
import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from sdtrain.__main__ import SIGNALS

WAIT_SECONDS = 600


def catches(pid):
    """Whether the process has handlers of its own yet; before that Python itself is being loaded."""
    status = Path(f"/proc/{pid}/status").read_text()
    return int(status.partition("SigCgt:\t")[2].split()[0], 16) >> (signal.SIGUSR1 - 1) & 1


def start(arguments, options):
    process = subprocess.Popen(arguments, stdout=subprocess.PIPE, stderr=subprocess.PIPE, **options)
    while process.poll() is None and not catches(process.pid):
        time.sleep(0.001)
    return process


def cpu_seconds(process):
    """What it used so far: a moment that does not move with the machine's load."""
    fields = Path(f"/proc/{process.pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def end(process, number):
    process.send_signal(number)
    _, errors = process.communicate(timeout=WAIT_SECONDS)
    return process.returncode, errors


@pytest.mark.parametrize("program", [["-m", "sdtrain"], [str(Path(sys.executable).with_name("sdtrain"))]])
@pytest.mark.parametrize("number", SIGNALS)
def test_from_its_first_moment_a_signal_ends_it_with_75(command, tmp_path, program, number):
    """The guard: 143, or the traceback of an import."""
    arguments, options = command(tmp_path / "run")
    code, errors = end(start([sys.executable, *program, *arguments[3:]], options), number)
    told = f"error: stopped by {signal.Signals(number).name} before the run began; continue with: "
    assert (code, errors[: len(told)], errors.count("\n")) == (75, told, 1)
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_at_random_moments_nothing_is_lost_and_the_next_attempt_goes_on(command, train, whole, hashes, tmp_path):
    """Where the directory is there, exit.json says it; of an attempt before it said something else."""
    chosen, codes = random.Random(5), []
    for moment in sorted((chosen.uniform(0, 6) for _ in range(12)), reverse=True):
        (tmp_path / "exit.json").write_text('{"exit_code": 0, "reason": "of an attempt before"}')
        process = start(*command(tmp_path))
        while process.poll() is None and cpu_seconds(process) < moment:
            time.sleep(0.01)
        code, errors = end(process, signal.SIGTERM)
        told = json.loads((tmp_path / "exit.json").read_text()) if (tmp_path / "exit.json").exists() else {}
        codes.append((round(moment, 2), code, told.get("reason", "")))
        assert code in (0, 75), codes
        assert "Traceback" not in errors, errors
    print(*codes, sep="\n")
    train(tmp_path)
    assert hashes(tmp_path) == hashes(whole)


def child(process):
    """The rank that it launched, once that one catches signals; until its exec it has its parent's handlers."""
    for pid in map(int, Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()):
        with contextlib.suppress(OSError):  # git has come and gone
            if b"\0LOCAL_RANK=1\0" in Path(f"/proc/{pid}/environ").read_bytes() and catches(pid):
                return pid
    return None


@pytest.mark.slow
@pytest.mark.parametrize("is_to_both", [False, True])
def test_a_second_rank_that_loads_tells_the_first_one(command, tmp_path, is_to_both):
    """The guard: it left by itself, and Lightning killed the first rank for that, with nothing said."""
    process = start(*command(tmp_path, "devices=2", "strategy=ddp"))
    while not (pid := child(process)):
        assert process.poll() is None, process.communicate()
        time.sleep(0.01)
    for number in [pid, process.pid] if is_to_both else [pid]:
        os.kill(number, signal.SIGTERM)
    _, errors = process.communicate(timeout=WAIT_SECONDS)
    assert process.returncode == 75, errors
    assert (tmp_path / "exit.json").exists(), errors
    assert json.loads((tmp_path / "exit.json").read_text())["exit_code"] == 75, errors
    assert "Traceback" not in errors


ENDED = """
import atexit, os, signal, sys, types
sys.argv = ["sdtrain", "+experiment=smoke"]
sys.modules["sdtrain.run"] = types.SimpleNamespace(run=lambda cfg: 76)
atexit.register(os.kill, os.getpid(), signal.SIGTERM)
from sdtrain.__main__ import cli
cli()
"""


def test_a_signal_that_comes_after_the_end_changes_no_code(command, tmp_path):
    _, options = command(tmp_path)
    done = subprocess.run([sys.executable, "-c", ENDED], capture_output=True, **options | {"cwd": tmp_path})
    assert (done.returncode, done.stderr) == (76, "")
