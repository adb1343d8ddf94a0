"""Mirrors may die, stall or hang; the run and metrics.jsonl must not notice."""

import threading
import time

import pytest

from sdtrain.tracker import fanout
from sdtrain.tracker.fanout import Fanout
from sdtrain.tracker.jsonl import JsonlTracker, read_rows
from sdtrain.tracker.none import NullTracker


class Recorder(NullTracker):
    def __init__(self):
        self.calls = []

    def start(self, run_directory, name, stage, config):
        self.calls.append(("start", stage))

    def log(self, row):
        self.calls.append(("log", row["step"]))

    def finish(self, summary):
        self.calls.append(("finish", summary))


class Broken(Recorder):
    def log(self, row):
        super().log(row)
        raise ConnectionResetError("core is gone")


class Stuck(Recorder):
    def __init__(self):
        super().__init__()
        self.freed = threading.Event()

    def log(self, row):
        self.freed.wait(60)

    def abandon(self):
        self.freed.set()


def test_a_healthy_mirror_sees_every_call_in_order_over_two_stages(tmp_path):
    mirror = Recorder()
    tracker = Fanout(JsonlTracker(tmp_path / "metrics.jsonl"), [mirror])
    for stage in ("autoencoder", "diffusion"):
        tracker.start(tmp_path, "run", stage, {})
        tracker.log({"step": 1})
        tracker.finish({"psnr": 1.0})
    once = [("log", 1), ("finish", {"psnr": 1.0})]
    assert mirror.calls == [("start", "autoencoder"), *once, ("start", "diffusion"), *once]


def test_a_mirror_that_raises_is_named_once_and_dropped(tmp_path, capfd):
    broken, healthy = Broken(), Recorder()
    tracker = Fanout(JsonlTracker(tmp_path / "metrics.jsonl"), [broken, healthy])
    for step in range(20):
        tracker.log({"step": step})
        time.sleep(0.001)
    tracker.finish({})
    assert broken.calls == [("log", 0)]
    assert len(healthy.calls) == 21
    assert len(read_rows(tmp_path / "metrics.jsonl")) == 20
    error = capfd.readouterr().err
    assert error.count("Broken is dropped: ConnectionResetError: core is gone") == 1


def test_a_mirror_whose_start_calls_exit_is_dropped(tmp_path, capfd):
    class Exits(Recorder):
        def start(self, run_directory, name, stage, config):
            raise SystemExit(1)

    tracker = Fanout(JsonlTracker(tmp_path / "metrics.jsonl"), [Exits()])
    tracker.start(tmp_path, "run", "diffusion", {})
    tracker.log({"step": 1})
    tracker.finish({})
    assert "Exits is dropped: SystemExit" in capfd.readouterr().err


def test_a_stuck_mirror_costs_no_time_and_is_abandoned_at_the_end(tmp_path, capfd):
    stuck = Stuck()
    tracker = Fanout(JsonlTracker(tmp_path / "metrics.jsonl"), [stuck], finish_timeout_seconds=0.2)
    started = time.monotonic()
    for step in range(100):
        tracker.log({"step": step})
    assert time.monotonic() - started < 1.0
    tracker.finish({})
    assert time.monotonic() - started < 3.0
    assert stuck.freed.is_set()
    assert "Stuck is dropped: it did not finish in 0.2 s" in capfd.readouterr().err


def test_a_mirror_that_falls_behind_is_dropped_instead_of_eating_memory(tmp_path, monkeypatch, capfd):
    monkeypatch.setattr(fanout, "MAX_WAITING_CALLS", 8)
    stuck = Stuck()
    tracker = Fanout(JsonlTracker(tmp_path / "metrics.jsonl"), [stuck], finish_timeout_seconds=0.2)
    for step in range(30):
        tracker.log({"step": step})
    tracker.finish({})
    assert "Stuck is dropped: it is 8 rows behind" in capfd.readouterr().err
    assert stuck.freed.is_set()


def test_an_error_of_the_truth_is_fatal(tmp_path):
    (tmp_path / "metrics.jsonl").mkdir()
    mirror = Recorder()
    with pytest.raises(OSError):
        Fanout(JsonlTracker(tmp_path / "metrics.jsonl"), [mirror]).log({"step": 1})
    assert mirror.calls == []
