"""metrics.jsonl as a file: what is in it after NaNs, crashes and resumes."""

import json
import os
import subprocess
import sys

import numpy as np
import pytest
import torch

from sdtrain.tracker.jsonl import JsonlTracker, current_rows, read_rows


def test_rows_are_strict_json_and_non_finite_floats_null(tmp_path):
    tracker = JsonlTracker(tmp_path / "metrics.jsonl")
    tracker.log({"step": 1, "loss": float("nan"), "deep": {"inf": [float("-inf"), 1.5]}, "path": tmp_path})
    tracker.log({"step": torch.tensor(2), "loss": torch.tensor(float("inf")), "array": np.float32(0.5)})

    def refuse(name):
        raise AssertionError(f"{name} is not JSON")

    lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
    first, second = (json.loads(line, parse_constant=refuse) for line in lines)
    assert first["loss"] is None
    assert first["deep"] == {"inf": [None, 1.5]}
    assert first["path"] == str(tmp_path)
    assert first["time"] > 1.7e9
    assert (second["step"], second["loss"], second["array"]) == (2, None, 0.5)


def test_every_row_is_on_disk_when_the_process_is_killed(tmp_path):
    path = tmp_path / "metrics.jsonl"
    script = (
        "import os, signal, sys\nfrom sdtrain.tracker.jsonl import JsonlTracker\n"
        "tracker = JsonlTracker(sys.argv[1])\n"
        "[tracker.log({'step': step}) for step in range(50)]\nos.kill(os.getpid(), signal.SIGKILL)"
    )
    assert subprocess.run([sys.executable, "-c", script, str(path)]).returncode == -9
    assert [row["step"] for row in read_rows(path)] == list(range(50))


def test_a_torn_last_line_is_passed_over_and_does_not_swallow_the_next_row(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\n{"step": 2, "lo')
    assert [row["step"] for row in read_rows(path)] == [1]
    JsonlTracker(path).log({"step": 2})
    assert [row["step"] for row in read_rows(path)] == [1, 2]
    assert len(path.read_text().splitlines()) == 2


def test_a_second_tracker_appends_and_finish_allows_more(tmp_path):
    path = tmp_path / "metrics.jsonl"
    for stage in ("autoencoder", "diffusion"):
        tracker = JsonlTracker(path)
        tracker.log({"stage": stage, "step": 1})
        tracker.finish({})
        tracker.log({"stage": stage, "step": 2})
    assert [(row["stage"], row["step"]) for row in read_rows(path)] == [
        ("autoencoder", 1),
        ("autoencoder", 2),
        ("diffusion", 1),
        ("diffusion", 2),
    ]


def test_an_image_is_a_row_with_a_path_inside_the_run(tmp_path):
    tracker = JsonlTracker(tmp_path / "metrics.jsonl")
    tracker.image("samples", tmp_path / "diffusion" / "samples" / "step_00000003.png", 3, ["a star"])
    (row,) = read_rows(tracker.path)
    assert row["event"] == "image"
    assert row["path"] == os.path.join("diffusion", "samples", "step_00000003.png")
    assert (row["step"], row["captions"]) == (3, ["a star"])


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs /dev/full")
def test_a_full_disk_is_an_error():
    with pytest.raises(OSError):
        JsonlTracker("/dev/full").log({"step": 1})


def test_rows_written_again_after_a_resume_supersede_the_old_ones():
    def train(step, loss, stage="diffusion"):
        return {"stage": stage, "step": step, "loss": loss}

    rows = [
        train(100, "autoencoder", stage="autoencoder"),
        train(50, 1.0),
        {"stage": "diffusion", "step": 60, "val/loss": 5.0},
        train(100, 0.9),
        train(140, 0.8),  # crashed here; resumed from 100 with another interval: 140 is never written again
        {"stage": "diffusion", "step": 100, "event": "resume"},
        {"stage": "diffusion", "step": 100, "event": "resume"},
        train(120, 0.7),
        {"summary": "no step"},
    ]
    kept = current_rows(rows)
    assert [row["loss"] for row in kept if "loss" in row] == ["autoencoder", 1.0, 0.9, 0.7]
    assert [row for row in kept if "loss" not in row] == [rows[2], rows[5], rows[6], rows[8]]
    assert current_rows([train(10, "old"), train(10, "new")]) == [train(10, "new")]
