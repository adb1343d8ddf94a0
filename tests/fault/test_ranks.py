"""Whole runs of two processes under faults: all are gone in time, and the same command goes on to the same bits.

The guards: the commit protocol, the cursor in it, noise that is keyed by sample, averages that count optimizer steps;
and callback/ending.py, without which a launcher hides the exit code or a rank is left behind.
"""

import hashlib
import json
import os
import random
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import pytest
import torch

pytestmark = pytest.mark.slow

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = ROOT / "tests" / "fault" / "faulty.py"
WAIT_SECONDS, GONE_SECONDS = 200, 15
STAGES = ("autoencoder", "diffusion")
TWO = ["devices=2", "strategy=ddp"] + [f"{stage}.trainer.num_accumulate=2" for stage in STAGES]
QUIET = [f"{stage}.callback.samples=null" for stage in STAGES]
QUIET += [f"{stage}.callback.evaluate.every_steps=2" for stage in STAGES]
QUIET += ["diffusion.metric.caption_match=null", "diffusion.metric.memorisation=null"]


@pytest.fixture
def launch(small):
    """launch(directory, *overrides, fault=None, launcher=()) -> a process in a session of its own."""
    processes = []

    def begin(directory, *overrides, fault=None, launcher=()):
        (directory / "fault").unlink(missing_ok=True)
        environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
        environment["SDTRAIN_FAULT"] = json.dumps(fault or {})
        arguments = [sys.executable, *launcher, SCRIPT, *small, *QUIET, *TWO, f"output_dir='{directory}'", *overrides]
        options = {"cwd": ROOT, "env": environment, "text": True, "start_new_session": True}
        process = subprocess.Popen(arguments, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, **options)
        processes.append(process)
        return process

    yield begin
    for process in processes:
        with suppress(ProcessLookupError):  # all that it started, also where it is gone itself
            os.killpg(process.pid, signal.SIGKILL)
        process.communicate()


def finish(process, directory, code=0):
    """Waits until the last process is gone, which closes the pipe; what was printed."""
    printed, _ = process.communicate(timeout=WAIT_SECONDS)
    ended = time.time()
    assert process.returncode == code, printed
    if code:
        seconds = ended - float((directory / "fault").read_text())
        assert seconds < GONE_SECONDS, f"gone after {seconds:.1f} s: {printed}"
    return printed


def result(directory):
    """Weights, averages, optimizer, sample ids and losses of a run, each step as it was done last."""
    found = {}
    for stage in STAGES:
        newest = max((directory / stage / "checkpoints").iterdir())
        for file in newest.glob("*.safetensors"):
            found[stage, file.name] = hashlib.sha256(file.read_bytes()).hexdigest()
        found[stage, "optimizer"] = torch.load(newest / "training.pt", weights_only=True)["optimizer_states"]
        assert (stage, "optimizer_00000.safetensors") in found
    for rank in range(2):
        steps = {}
        for line in (directory / f"ledger_rank{rank}.jsonl").read_text().splitlines():
            stage, step, _, ids = json.loads(line)
            steps.setdefault((stage, step), []).append(ids)
        num = {"recognition": 1}
        found |= {(*place, rank): ids[-num.get(place[0], 2) :] for place, ids in steps.items()}
    for line in (directory / "metrics.jsonl").read_text().splitlines():
        row = json.loads(line)
        if "loss" in row:
            found[row["stage"], row["step"], "loss"] = row["loss"]
    return found


@pytest.fixture(scope="module")
def whole(small, tmp_path_factory):
    directory = tmp_path_factory.mktemp("whole")
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    arguments = [sys.executable, SCRIPT, *small, *QUIET, *TWO, f"output_dir='{directory}'"]
    subprocess.run(arguments, cwd=ROOT, env=environment, check=True, timeout=WAIT_SECONDS, capture_output=True)
    assert json.loads((directory / "exit.json").read_text()) == {"exit_code": 0, "reason": "done"}
    return result(directory)


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_killed_at_random_steps(launch, whole, tmp_path, seed):
    """A rank dies once in each stage, and the other one goes with it."""
    chosen = random.Random(seed)
    for stage in STAGES:
        place = {"stage": stage, "step": chosen.randint(1, 4), "rank": chosen.randint(0, 1)}
        process = launch(tmp_path, fault={**place, "where": "step", "signal": "SIGKILL"})
        finish(process, tmp_path, code=-signal.SIGKILL if place["rank"] == 0 else process.wait(WAIT_SECONDS))
        assert process.returncode != 0
    finish(launch(tmp_path), tmp_path)
    assert result(tmp_path) == whole


SIGNALS = [
    {"stage": "autoencoder", "step": 1, "where": "step", "rank": 1, "signal": "SIGTERM"},
    {"stage": "autoencoder", "step": 4, "where": "save", "rank": 0, "signal": "SIGUSR1"},
    {"stage": "diffusion", "step": 2, "where": "validation", "rank": 1, "signal": "SIGUSR1", "to": "all"},
    {"stage": "diffusion", "step": 4, "where": "step", "rank": 0, "signal": "SIGINT", "to": "all"},
]


def test_signals_to_one_or_all_in_a_step_a_save_and_figures(launch, whole, tmp_path):
    for fault in SIGNALS:
        printed = finish(launch(tmp_path, fault=fault), tmp_path, code=75)
        assert json.loads((tmp_path / "exit.json").read_text())["exit_code"] == 75
        assert f"error: stopped by {fault['signal']} at step" in printed
        assert "Traceback" not in printed
    finish(launch(tmp_path), tmp_path)
    assert result(tmp_path) == whole


def test_under_torchrun_the_launcher_is_told_and_the_code_is_in_exit_json(launch, whole, tmp_path):
    launcher = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2")
    process = launch(tmp_path, launcher=launcher)
    ledger, until = tmp_path / "ledger_rank1.jsonl", time.monotonic() + WAIT_SECONDS
    while not (ledger.exists() and '"autoencoder", 2' in ledger.read_text()):
        assert process.poll() is None, process.communicate()[0]
        assert time.monotonic() < until
        time.sleep(0.02)
    (tmp_path / "fault").write_text(str(time.time()))
    process.send_signal(signal.SIGTERM)
    finish(process, tmp_path, code=process.wait(WAIT_SECONDS))
    assert process.returncode != 0
    assert json.loads((tmp_path / "exit.json").read_text())["exit_code"] == 75
    finish(launch(tmp_path, launcher=launcher), tmp_path)
    assert json.loads((tmp_path / "exit.json").read_text())["exit_code"] == 0
    assert result(tmp_path) == whole


@pytest.mark.parametrize(("number", "code"), [("SIGSTOP", 77), ("SIGKILL", 1)])
def test_a_data_worker_that_is_dead_ends_the_run(launch, tmp_path, number, code):
    """The guard: a worker that is stopped is the watchdog's, which names its rank; of a killed one torch tells."""
    fault = {"stage": "autoencoder", "step": 3, "where": "step", "rank": 1, "signal": number, "to": "worker"}
    limits = [f"autoencoder.callback.watchdog.{name}" for name in ("timeout_seconds=6", "slow_timeout_seconds=60")]
    options = ["stages=[autoencoder]", "+data.num_workers=1", "autoencoder.trainer.max_steps=100", *limits]
    process = launch(tmp_path, *options, fault=fault)
    printed, _ = process.communicate(timeout=WAIT_SECONDS)
    assert process.returncode == code, printed
    said = json.loads((tmp_path / "exit.json").read_text())
    assert said["exit_code"] == code
    expected = (
        "hang: rank 1 (next batch of step"
        if number == "SIGSTOP"
        else "rank 1: crashed: RuntimeError: DataLoader worker"
    )
    assert said["reason"].startswith(expected)


def taken(directory, stage="autoencoder"):
    """(step, sample ids of both ranks and both micro-batches) as they came."""
    ranks = []
    for rank in range(2):
        rows = [json.loads(line) for line in (directory / f"ledger_rank{rank}.jsonl").read_text().splitlines()]
        ranks.append([(step, ids) for at, step, _, ids in rows if at == stage])
    steps = zip(*(zip(rows[::2], rows[1::2]) for rows in ranks))
    return [(first[0][0], sum((ids for rank in (first, second) for _, ids in rank), [])) for first, second in steps]


def test_a_batch_that_is_no_number_is_gone_round(launch, tmp_path):
    """The guard: on_nonfinite=rollback goes back to step 2, and passes over the samples since then, and no others."""
    fault = {"stage": "autoencoder", "step": 3, "where": "nan", "rank": 1}
    options = ["stages=[autoencoder]", "autoencoder.trainer.max_steps=6"]
    options += ["autoencoder.callback.guard.on_nonfinite=rollback"]
    printed = finish(launch(tmp_path, *options, fault=fault), tmp_path)
    assert printed.count("autoencoder: not finite: loss at step 3") == 1
    (row,) = [json.loads(line) for line in (tmp_path / "nonfinite.jsonl").read_text().splitlines()]
    assert (row["step"], row["rank"], row["action"], len(row["sample_id"])) == (3, 1, "rollback", 8)
    steps = taken(tmp_path)
    assert [step for step, _ in steps] in ([1, 2, 3, 4, 3, 4, 5, 6], [1, 2, 3, 4, 5, 3, 4, 5, 6])
    every = [number for _, ids in steps for number in ids]
    assert len(every) == len(set(every)), "64 samples, 8 a step: the first epoch, each once"
    assert sorted(row["sample_id"]) == sorted(steps[2][1])


def test_a_batch_that_is_no_number_is_left_out(launch, tmp_path):
    """The guard: on_nonfinite=skip, also where one rank alone has it, in the adversary's steps."""
    fault = {"stage": "autoencoder", "step": 3, "where": "nan", "rank": 1}
    options = ["stages=[autoencoder]", "autoencoder.trainer.max_steps=6"]
    options += [f"autoencoder.callback.{name}" for name in ("guard.on_nonfinite=skip", "divergence.every_steps=1")]
    finish(launch(tmp_path, *options, fault=fault), tmp_path)
    (row,) = [json.loads(line) for line in (tmp_path / "nonfinite.jsonl").read_text().splitlines()]
    assert (row["step"], row["rank"], row["action"]) == (3, 1, "skip")
    losses = {}
    for line in (tmp_path / "metrics.jsonl").read_text().splitlines():
        losses |= {r["step"]: r["loss"] for r in [json.loads(line)] if r.get("stage") == "autoencoder" and "loss" in r}
    assert [step for step, loss in losses.items() if loss is None] == [3]
