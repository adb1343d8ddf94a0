"""Whole runs in processes of their own, stopped by signals: the same command goes on, to the same bits."""

import json
import shlex
import signal
import subprocess
import time
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow

STEPS = ["autoencoder.trainer.max_steps=8", "diffusion.trainer.max_steps=8"]
WAIT_SECONDS = 120


@pytest.fixture(scope="module")
def whole_run(train, hashes, tmp_path_factory):
    return hashes(train(tmp_path_factory.mktemp("whole"), *STEPS))


@pytest.fixture
def start(command):
    """start(directory, *overrides) -> a process that runs; it is ended with the test."""
    processes = []

    def begin(directory, *overrides):
        arguments, options = command(directory, *STEPS, *overrides)
        process = subprocess.Popen(arguments, stdout=subprocess.PIPE, stderr=subprocess.PIPE, **options)
        processes.append(process)
        return process

    yield begin
    for process in processes:
        process.kill()
        process.communicate()


def wait_for(process, directory, stage, step):
    """Returns as soon as the row of this step is written."""
    began, file = time.monotonic(), directory / "metrics.jsonl"
    while time.monotonic() - began < WAIT_SECONDS:
        rows = [json.loads(line) for line in file.read_text().split("\n")[:-1]] if file.exists() else []
        if any(row.get("stage") == stage and row.get("step", 0) >= step and "loss" in row for row in rows):
            return
        assert process.poll() is None, process.communicate()[1]
        time.sleep(0.01)
    raise AssertionError(f"step {step} of {stage} was not reached")


@pytest.mark.parametrize(("stage", "step"), [("autoencoder", 3), ("diffusion", 1), ("diffusion", 5)])
def test_killed_and_run_again(start, train, whole_run, hashes, tmp_path, stage, step):
    (tmp_path / "exit.json").write_text('{"exit_code": 75}')  # of an attempt before
    process = start(tmp_path)
    wait_for(process, tmp_path, stage, step)
    process.kill()
    assert process.wait() == -signal.SIGKILL
    assert not (tmp_path / "exit.json").exists()  # it says how this attempt ended, and this one could not say
    train(tmp_path, *STEPS)
    assert hashes(tmp_path) == whole_run
    assert json.loads((tmp_path / "exit.json").read_text())["exit_code"] == 0


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_stopped_and_continued_with_the_command_it_prints(start, whole_run, hashes, tmp_path, command, number):
    process = start(tmp_path)
    wait_for(process, tmp_path, "diffusion" if number == signal.SIGINT else "autoencoder", 2)
    process.send_signal(number)
    _, errors = process.communicate(timeout=WAIT_SECONDS)
    assert process.returncode == 75, errors
    assert json.loads((tmp_path / "exit.json").read_text())["exit_code"] == 75
    assert "Traceback" not in errors
    (line,) = [line for line in errors.splitlines() if "continue with: " in line]
    stopped = int(line.partition(" at step ")[2].partition(";")[0])
    saved = [int(path.name.removeprefix("step_")) for path in tmp_path.glob("*/checkpoints/*")]
    assert stopped in saved

    again = shlex.split(line.partition("continue with: ")[2])
    done = subprocess.run(again, capture_output=True, **command(tmp_path)[1], timeout=WAIT_SECONDS)
    assert done.returncode == 0, done.stderr
    assert hashes(tmp_path) == whole_run


@pytest.mark.parametrize(
    ("overrides", "code", "expected"),
    [
        (["resume=must"], 3, "error: resume=must, but no checkpoint"),
        (["autoencoder.optim.lr=1e30"], 76, "error: not finite: "),
        (["stages=[diffusion]"], 2, "error: stages=[diffusion] needs a first stage"),
        (["first_stage.weights=LICENSE"], 2, "error: first_stage.weights: LICENSE is no safetensors file"),
    ],
)
def test_the_code_of_a_run_that_cannot_go_on(start, tmp_path, overrides, code, expected):
    process = start(tmp_path, *overrides)
    _, errors = process.communicate(timeout=WAIT_SECONDS)
    assert (process.returncode, errors.splitlines()[0][: len(expected)]) == (code, expected), errors
    assert "Traceback" not in errors


def test_another_config_ends_with_2_before_torch(start, command, tmp_path, train):
    train(tmp_path, *STEPS)
    before = {path: path.stat().st_mtime_ns for path in Path(tmp_path).rglob("*")}
    began = time.monotonic()
    process = start(tmp_path, "seed=1")
    _, errors = process.communicate(timeout=WAIT_SECONDS)
    assert process.returncode == 2
    assert "holds a run of another config: seed 0 -> 1" in errors.splitlines()[0]
    assert time.monotonic() - began < 10
    assert {path: path.stat().st_mtime_ns for path in Path(tmp_path).rglob("*")} == before
