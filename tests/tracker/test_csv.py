"""metrics.csv as a table: columns that come later, lines that a crash cut off, runs that go on."""

import csv

from sdtrain.build import build
from sdtrain.config import load_config
from sdtrain.tracker.csv import CsvTracker
from sdtrain.tracker.jsonl import read_rows
from sdtrain.tracker.row import numbers


def table(path):
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def test_a_column_that_comes_later_is_empty_before(tmp_path):
    tracker = CsvTracker()
    tracker.start(tmp_path, "quick", "diffusion", {})
    tracker.log({"event": "start", "stage": "diffusion", "step": 0})
    tracker.log({"stage": "diffusion", "step": 1, "images": 8, "loss": 0.5, "latent": {"counts": [1]}})
    tracker.log({"stage": "diffusion", "step": 1, "images": 8, 'data/replaced_in/a,"b".tar': 3})
    tracker.log({"stage": "diffusion", "step": 2, "images": 16, "loss": 0.25})
    tracker.image("samples", tmp_path / "absent.png", 2)
    path = tmp_path / "diffusion" / "metrics.csv"
    shard = 'data/replaced_in/a,"b".tar'
    assert table(path) == [  # while it is open: each line is there at once
        {"step": "1", "images": "8", "loss": "0.5", shard: ""},
        {"step": "1", "images": "8", "loss": "", shard: "3"},
        {"step": "2", "images": "16", "loss": "0.25", shard: ""},
    ]
    tracker.finish({"psnr": 1.0})
    assert [file.name for file in path.parent.iterdir()] == ["metrics.csv"]


def test_a_run_that_goes_on_appends_after_the_last_whole_line(tmp_path):
    path = tmp_path / "diffusion" / "metrics.csv"
    first = CsvTracker()
    first.start(tmp_path, "quick", "diffusion", {})
    first.log({"step": 1, "loss": 0.5})
    first.finish({})
    with path.open("a") as file:
        file.write("2,0.2")  # cut off
    second = CsvTracker()
    second.start(tmp_path, "quick", "diffusion", {})
    second.log({"step": 2, "loss": 0.25})
    second.log({"step": 3, "loss": 0.1, "val/loss": 1.0})
    second.finish({})
    assert path.read_text() == "step,loss,val/loss\n1,0.5,\n2,0.25,\n3,0.1,1.0\n"


def test_two_stages_have_a_table_each(tmp_path):
    tracker = CsvTracker()
    for stage in ("autoencoder", "diffusion"):
        tracker.start(tmp_path, "quick", stage, {})
        tracker.log({"stage": stage, "step": 1, "loss": 0.5})
        tracker.finish({})
    assert all(len(table(tmp_path / stage / "metrics.csv")) == 1 for stage in ("autoencoder", "diffusion"))


def test_the_table_of_a_run_is_its_rows(finished, tmp_path):
    wanted = [row for row in read_rows(finished / "metrics.jsonl") if row.get("stage") == "diffusion"]
    tracker = build(load_config(["+experiment=smoke", "tracker=csv"]).tracker)
    tracker.start(tmp_path, "quick", "diffusion", {})
    for row in wanted:
        tracker.log({key: value for key, value in row.items() if key != "time"})
    tracker.finish({})
    found = table(tmp_path / "diffusion" / "metrics.csv")
    shown = [numbers({k: v for k, v in row.items() if k != "time"}) for row in wanted if "event" not in row]
    assert len(found) == len(shown) > 5
    for line, row in zip(found, shown):
        assert {key: float(value) for key, value in line.items() if value} == {
            k: v for k, v in row.items() if k != "time"
        }
