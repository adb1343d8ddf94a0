"""W&B's service is killed in the middle of a real run, which goes on as if nothing had happened, and says so once."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not sys.platform.startswith("linux"), reason="looks for the service in /proc"),
]
WAIT_SECONDS = 120


def service_of(process):
    """The pid of the wandb-core that the run started, or nothing."""
    for task in Path(f"/proc/{process.pid}/task").iterdir():
        for pid in (task / "children").read_text().split():
            if "wandb-core" in Path(f"/proc/{pid}/cmdline").read_text():
                return int(pid)
    return None


def rows(directory):
    file = directory / "metrics.jsonl"
    told = [json.loads(line) for line in file.read_text().split("\n")[:-1]] if file.exists() else []
    return [row for row in told if row.get("stage") == "autoencoder" and "loss" in row]


def test_a_killed_service_costs_a_line(command, tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "offline")
    steps = ["stages=[autoencoder]", "autoencoder.trainer.max_steps=12"]
    arguments, options = command(tmp_path / "run", "tracker=wandb", *steps)
    process = subprocess.Popen(arguments, stdout=subprocess.PIPE, stderr=subprocess.PIPE, **options)
    try:
        until = time.monotonic() + WAIT_SECONDS
        while not rows(tmp_path / "run") or service_of(process) is None:
            assert process.poll() is None, process.communicate()[1]
            assert time.monotonic() < until
            time.sleep(0.01)
        os.kill(service_of(process), signal.SIGKILL)
        out, error = process.communicate(timeout=WAIT_SECONDS)
    finally:
        process.kill()
        process.wait()
    assert process.returncode == 0, error
    assert error.count("warning: WandbTracker is dropped:") == 1
    assert "Traceback" not in error
    assert "\nreport  " in out
    assert [row["step"] for row in rows(tmp_path / "run")] == list(range(1, 13))
