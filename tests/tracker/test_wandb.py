"""Real offline runs, read back with `wandb leet inspect`; no account, no network, no prompt."""

import json
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from sdtrain.tracker.wandb import WandbTracker, resolved_mode

WANDB = Path(sys.executable).with_name("wandb")


@pytest.fixture(autouse=True)
def _no_account(monkeypatch, tmp_path):
    for name in ("WANDB_API_KEY", "WANDB_MODE", "WANDB_BASE_URL", "WANDB_DATA_DIR"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))


def inspect(segment):
    output = subprocess.run([WANDB, "leet", "inspect", "--json", segment], capture_output=True, text=True, check=True)
    return [json.loads(line) for line in output.stdout.splitlines()]


def test_an_offline_run_holds_rows_config_picture_and_summary(tmp_path, monkeypatch):
    monkeypatch.setenv("FAKE_TOKEN", "hunter2hunter2")
    monkeypatch.setattr(sys, "argv", ["sdtrain", "logger.api_key=hunter2hunter2"])
    Image.new("RGB", (64, 64), "red").save(tmp_path / "step_00000002.png")
    config = {"seed": 1, "optim": {"lr": 1e-4}, "data": {"password": "hunter2hunter2", "url": "x?hunter2hunter2"}}
    tracker = WandbTracker()
    tracker.start(tmp_path, "quick", "diffusion", config)
    tracker.log({"stage": "diffusion", "step": 1, "loss": 0.5})
    tracker.log({"stage": "diffusion", "step": 2, "loss": 0.25, "val/psnr": 20.0})
    tracker.log({"stage": "diffusion", "step": 2, "event": "warning"})
    tracker.image("diffusion/samples", tmp_path / "step_00000002.png", 2, ["a red star", "a ring"])
    tracker.finish({"psnr": 21.0})

    (segment,) = (tmp_path / "wandb").glob("offline-run-*")
    records = inspect(segment)
    (run,) = [record["run"] for record in records if record["type"] == "run"]
    assert (run["project"], run["run_group"], run["job_type"]) == ("sdtrain", "quick", "diffusion")
    assert run["run_id"] == (tmp_path / "diffusion" / "wandb_id").read_text().strip()
    assert run["config"]["update"]["optim"] == {"lr": 1e-4}
    rows = [record["history"]["item"] for record in records if record["type"] == "history"]
    assert [(row["step"], row["loss"]) for row in rows if "loss" in row] == [(1, 0.5), (2, 0.25)]
    (picture,) = [row for row in rows if "samples" in json.dumps(row)]
    assert "a red star | a ring" in json.dumps(picture)
    assert any(r["metric"].get("step_metric") == "step" for r in records if r["type"] == "metric")
    assert any('"psnr": 21' in json.dumps(r["summary"]) for r in records if r["type"] == "summary")
    assert "hunter2" not in json.dumps(records)
    leaks = [path for path in tmp_path.rglob("*") if path.is_file() and b"hunter2" in path.read_bytes()]
    assert leaks == []


def test_lineage_histograms_alerts_and_a_table_of_prompts_arrive(tmp_path):
    Image.new("RGB", (64, 64), "red").save(tmp_path / "grid.png")
    (tmp_path / "autoencoder").mkdir()
    (tmp_path / "autoencoder" / "wandb_id").write_text("autoencoder-123\n")
    tracker = WandbTracker()
    tracker.start(tmp_path, "quick", "diffusion", {"seed": 1})
    tracker.log({"event": "start", "stage": "diffusion", "step": 4, "config_hash": "c0", "first_stage": "f0"})
    tracker.log({"stage": "diffusion", "step": 5, "images": 40, "latent": {"low": -1, "high": 1, "counts": [1, 6]}})
    tracker.log({"event": "alert", "stage": "diffusion", "step": 5, "title": "loss spike", "text": "it rose"})
    pictures = np.zeros((2, 8, 8, 3), np.uint8)
    tracker.image("diffusion/samples", tmp_path / "grid.png", 5, ["a star", "a ring"], pictures)
    tracker.finish({"weight_hash": "w0", "psnr": 21.0})

    (segment,) = (tmp_path / "wandb").glob("offline-run-*")
    records = inspect(segment)
    told = [r["config"]["update"]["lineage"] for r in records if r["type"] == "config"]
    lineage = {"config_hash": "c0", "first_stage": "f0", "parent_run_id": "autoencoder-123"}
    assert told[-2:] == [lineage, {**lineage, "weight_hash": "w0"}]
    rows = [record["history"]["item"] for record in records if record["type"] == "history"]
    drawn = next(row for row in rows if row.get("images") == 40)
    assert {k: v for k, v in drawn.items() if k.startswith("latent.")} == {
        "latent._type": "histogram",
        "latent.values": [1, 6],
        "latent.bins": [-1, 0, 1],
    }
    (alert,) = [record["alert"] for record in records if record["type"] == "alert"]
    assert (alert["title"], alert["text"]) == ("loss spike", "it rose")
    (path,) = (segment / "files" / "media" / "table").rglob("*.table.json")
    table = json.loads(path.read_text())
    assert table["columns"] == ["step", "prompt", "picture"]
    assert [row[:2] for row in table["data"]] == [[5, "a star"], [5, "a ring"]]
    staged = [path for path in (tmp_path / "wandb" / "artifacts").rglob("*") if path.is_file()]
    assert sum(path.read_bytes().startswith(b"\x89PNG") for path in staged) >= 1  # of two that are the same
    assert {"step", "images"} <= {r["metric"].get("name") for r in records if r["type"] == "metric"}
    assert [r["artifact"]["type"] for r in records if r["type"] == "artifact"] == ["run_table"]


def test_an_offline_run_asks_no_network(tmp_path, monkeypatch):
    with socket.create_server(("127.0.0.1", 0)) as server:
        address = f"http://127.0.0.1:{server.getsockname()[1]}"
        for name in ("WANDB_BASE_URL", "HTTP_PROXY", "HTTPS_PROXY", "http_proxy", "https_proxy"):
            monkeypatch.setenv(name, address)
        Image.new("RGB", (8, 8), "red").save(tmp_path / "grid.png")
        tracker = WandbTracker()
        tracker.start(tmp_path, "quick", "diffusion", {})
        tracker.log({"event": "start", "stage": "diffusion", "step": 0, "first_stage": "f0"})
        tracker.log({"step": 1, "loss": 0.5})
        tracker.log({"event": "alert", "title": "loss spike", "text": "it rose"})
        tracker.image("samples", tmp_path / "grid.png", 1, ["a star"], np.zeros((1, 8, 8, 3), np.uint8))
        tracker.finish({"psnr": 21.0})
        server.settimeout(0)
        with pytest.raises(BlockingIOError):
            server.accept()


def test_an_online_run_has_artifacts_of_its_manifests(tmp_path):
    """Where they are made, without the server that takes them: W&B writes the record of an offline run, too."""
    (tmp_path / "diffusion" / "checkpoints" / "step_00000002").mkdir(parents=True)
    (tmp_path / "diffusion" / "checkpoints" / "step_00000002" / "COMPLETE.json").write_text("{}")
    (tmp_path / "diffusion" / "first_stage.json").write_text("{}")
    tracker = WandbTracker()
    tracker.start(tmp_path, "quick/run", "diffusion", {})
    tracker._is_online = True
    tracker.log({"event": "start", "stage": "diffusion", "step": 0, "first_stage": "f0", "config_hash": "c0"})
    tracker.finish({"psnr": 21.0})
    (segment,) = (tmp_path / "wandb").glob("offline-run-*")
    (artifact,) = [record["artifact"] for record in inspect(segment) if record["type"] == "artifact"]
    assert (artifact["name"], artifact["type"]) == ("quick-run-diffusion", "model")
    assert json.loads(artifact["metadata"])["first_stage"] == "f0"
    assert {entry["path"] for entry in artifact["manifest"]["contents"]} == {"COMPLETE.json", "first_stage.json"}


def test_a_second_process_goes_on_under_the_same_id_and_stages_have_their_own(tmp_path):
    for stage in ("autoencoder", "diffusion", "diffusion"):
        tracker = WandbTracker()
        tracker.start(tmp_path, "quick", stage, {})
        tracker.log({"step": 5, "loss": 1.0})
        tracker.finish({})
    runs = [
        record["run"]
        for segment in (tmp_path / "wandb").glob("offline-run-*")
        for record in inspect(segment)
        if record["type"] == "run"
    ]
    assert sorted(run["job_type"] for run in runs) == ["autoencoder", "diffusion", "diffusion"]
    assert len({run["run_id"] for run in runs}) == 2
    assert {run["run_group"] for run in runs} == {"quick"}


def test_modes(tmp_path, monkeypatch):
    assert [resolved_mode(mode) for mode in ("auto", "online", "offline", "disabled")] == [
        "offline",  # no key: never a prompt
        "offline",
        "offline",
        "disabled",
    ]
    (tmp_path / "netrc").write_text("machine api.wandb.ai login user password 0123456789\n")
    assert resolved_mode("auto") == "online"
    monkeypatch.setenv("WANDB_BASE_URL", "https://wandb.example.org")
    assert resolved_mode("auto") == "offline"
    monkeypatch.setenv("WANDB_API_KEY", "0" * 40)
    assert resolved_mode("auto") == "online"
    monkeypatch.setenv("WANDB_MODE", "offline")
    assert resolved_mode("auto") == "offline"
    monkeypatch.setenv("WANDB_MODE", "disabled")
    assert resolved_mode("auto") == "disabled"


@pytest.mark.parametrize(("mode", "told"), [("online", 1), ("auto", 0)])
def test_online_that_becomes_offline_is_told(tmp_path, capsys, mode, told):
    tracker = WandbTracker(mode=mode)
    tracker.start(tmp_path, "quick", "diffusion", {})
    tracker.finish({})
    assert capsys.readouterr().out.count("offline, as there is no key: set WANDB_API_KEY") == told


def test_disabled_writes_nothing(tmp_path):
    tracker = WandbTracker(mode="disabled")
    tracker.start(tmp_path, "quick", "diffusion", {})
    tracker.log({"step": 1})
    tracker.image("samples", tmp_path / "absent.png", 1)
    tracker.finish({})
    assert list(tmp_path.iterdir()) == []


HURT_RUN = """
import os, signal, subprocess, sys, time
from pathlib import Path
from sdtrain.tracker.fanout import Fanout
from sdtrain.tracker.jsonl import JsonlTracker
from sdtrain.tracker.wandb import WandbTracker

directory, number = Path(sys.argv[1]), int(sys.argv[2])
tracker = Fanout(JsonlTracker(directory / "metrics.jsonl"), [WandbTracker()], finish_timeout_seconds=1.0)
tracker.start(directory, "quick", "diffusion", {})
tracker.log({"step": 0})
while not list((directory / "wandb").glob("offline-run-*/*.wandb")):
    time.sleep(0.05)
time.sleep(0.3)
children = Path(f"/proc/{os.getpid()}/task")
pids = [int(pid) for task in children.iterdir() for pid in (task / "children").read_text().split()]
assert pids
[os.kill(pid, number) for pid in pids]
started = time.monotonic()
for step in range(1, 2000):
    tracker.log({"step": step, "loss": 0.5})
assert time.monotonic() - started < 2.0
tracker.finish({})
print("done", flush=True)
"""


@pytest.mark.skipif(not os.path.exists("/proc/self/task"), reason="needs Linux")
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSTOP])
def test_a_run_outlives_a_killed_or_frozen_service(tmp_path, number):
    command = [sys.executable, "-c", HURT_RUN, str(tmp_path), str(int(number))]
    result = subprocess.run(command, capture_output=True, text=True, timeout=30)
    assert (result.returncode, result.stdout) == (0, "done\n"), result.stderr
    assert result.stderr.count("WandbTracker is dropped") == 1
    assert "Traceback" not in result.stderr
    assert len((tmp_path / "metrics.jsonl").read_text().splitlines()) == 2000
