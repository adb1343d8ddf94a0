"""Where a run began and what it read: in a real run of both stages, and in files that a crash left."""

import ast
import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from sdtrain.callback.accounts import Accounts, lineage, num_starts, together
from sdtrain.contracts import Context
from sdtrain.data.datamodule import ShardDataModule
from sdtrain.data.sequential import SequentialDataModule
from sdtrain.optim.averaging import Exponential
from sdtrain.tracker.jsonl import JsonlTracker, read_rows

ROOT = Path(__file__).parents[2]


def test_a_run_tells_what_it_comes_from_and_what_it_read(finished):
    rows = read_rows(finished / "metrics.jsonl")
    starts = {row["stage"]: row for row in rows if row.get("event") == "start"}
    assert list(starts) == ["recognition", "autoencoder", "diffusion"]
    complete = json.loads(max((finished / "diffusion" / "checkpoints").glob("*/COMPLETE.json")).read_text())
    told = starts["diffusion"]
    assert {key: told[key] for key in ("config_hash", "data_fingerprint")} == {
        key: complete[key] for key in ("config_hash", "data_fingerprint")
    }
    manifest = json.loads((finished / "autoencoder" / "manifest.json").read_text())
    assert told["first_stage"] == manifest["weight_hash"]
    assert "first_stage" not in starts["autoencoder"]
    assert (told["step"], told["restarts"], told["world_size"]) == (0, 0, 1)
    (account,) = [row for row in rows if row.get("stage") == "diffusion" and "data/read" in row]
    assert (account["step"], account["images"], account["restarts"]) == (4, 32, 0)
    assert account["data/read"] >= 32
    assert account["data/replaced"] == 0
    assert account["ema_decay"] == pytest.approx(4 / 13)


def test_restarts_are_counted_by_stage_from_what_was_written(tmp_path):
    path = tmp_path / "metrics.jsonl"
    assert num_starts(path, "diffusion") == 0
    tracker = JsonlTracker(path)
    context = Context("diffusion", tmp_path, tmp_path / "diffusion", tracker, 0, 4, 9)
    for stage in ("autoencoder", "diffusion", "diffusion"):
        tracker.log({"event": "start", "stage": stage, "step": 0})
        tracker.log({"stage": stage, "step": 1, "loss": 0.5})
    tracker.finish({})
    with path.open("a") as file:
        file.write('{"event": "start", "stage": "diff')  # cut off
    assert (num_starts(path, "autoencoder"), num_starts(path, "diffusion")) == (1, 2)

    average = SimpleNamespace(profiles=[Exponential(0.5)], num_updates=100)
    data = SimpleNamespace(accounting=lambda: {"read": 8, "replaced/corrupt": 1}, same_on_every_rank=())
    trainer = SimpleNamespace(is_global_zero=True, global_step=5, world_size=1, datamodule=data)
    shares = {"cut_caption_share/clip": (0, 8), "cut_caption_share/t5": (2, 8), "of nothing": (0, 0)}
    stage = SimpleNamespace(context=context, images_seen=20, ema=average, shares=lambda: shares)
    accounts = Accounts(every_steps=1)
    accounts.on_train_start(trainer, stage)
    accounts.act(trainer, stage)
    accounts.act(trainer, stage)
    begun, row, warning, again = read_rows(path)[-4:]
    assert warning["event"] == "warning"
    assert warning["warning"].endswith("lose their end: cut_caption_share/clip 0.0%, cut_caption_share/t5 25.0%")
    assert "event" not in again  # it is told once
    assert (begun["event"], begun["step"], begun["restarts"], begun["world_size"]) == ("start", 5, 2, 1)
    assert {key: row[key] for key in list(row)[:-1]} == {
        **{"stage": "diffusion", "step": 5, "images": 20, "restarts": 2, "ema_decay": 0.5},
        **{"data/read": 8, "data/replaced/corrupt": 1, "data/empty_caption_share": 0.0},
        **{"data/cut_caption_share/clip": 0.0, "data/cut_caption_share/t5": 0.25},
    }
    trainer.is_global_zero = False
    accounts.on_train_start(trainer, stage)
    accounts.act(trainer, stage)
    assert len(read_rows(path)) == 10  # as before


def test_counts_of_processes_add_up_and_those_of_the_run_do_not():
    first = {"read": 8, "replaced": 1, "replaced_in/a.tar": 1, "bad_shards": 2, "lost/no image": 3, "epoch/a": 0.5}
    second = {"read": 7, "replaced": 2, "replaced_in/b.tar": 2, "bad_shards": 1, "lost/no image": 3, "epoch/a": 0.5}
    assert together([first, second], ShardDataModule.same_on_every_rank) == {
        **{"read": 15, "replaced": 3, "replaced_in/a.tar": 1, "replaced_in/b.tar": 2},
        **{"bad_shards": 2, "lost/no image": 3, "epoch/a": 0.5},
    }
    assert together([first, second], SequentialDataModule.same_on_every_rank)["lost/no image"] == 6


RANK = """
import sys
from types import SimpleNamespace
import torch.distributed as dist
from sdtrain.callback.accounts import Accounts

rank = int(sys.argv[1])
dist.init_process_group("gloo", init_method=f"file://{sys.argv[2]}", rank=rank, world_size=2)
counts = [{"read": 8, "epoch": 0.25}, {"read": 5, "replaced/corrupt": 1, "epoch": 0.25}][rank]
data = SimpleNamespace(accounting=lambda: counts, same_on_every_rank=("epoch",))
context = SimpleNamespace(stage="diffusion", tracker=SimpleNamespace(log=print))
trainer = SimpleNamespace(is_global_zero=rank == 0, global_step=5, world_size=2, datamodule=data)
shares = {"cut_caption_share": (rank, 200)}
stage = SimpleNamespace(context=context, images_seen=20, ema=None, shares=lambda: shares)
Accounts(every_steps=1).act(trainer, stage)
dist.destroy_process_group()
"""


@pytest.mark.slow
def test_two_processes_tell_their_sum_once(tmp_path):
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", RANK, str(rank), str(tmp_path / "meet")],
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, "PYTHONPATH": str(ROOT)},
        )
        for rank in range(2)
    ]
    try:
        said = [process.communicate(timeout=120)[0] for process in processes]
    finally:
        for process in processes:
            process.kill()
            process.wait()
    assert [process.returncode for process in processes] == [0, 0]
    place = {"stage": "diffusion", "step": 5, "images": 20, "restarts": 0}
    wanted = {**place, "data/read": 13, "data/epoch": 0.25, "data/replaced/corrupt": 1, "data/empty_caption_share": 0.0}
    wanted |= {"data/cut_caption_share": 1 / 400}
    assert (ast.literal_eval(said[0]), said[1]) == (wanted, "")


def test_the_latents_of_a_cache_are_one_hash(tmp_path):
    context = Context("diffusion", tmp_path, tmp_path, None, 0, 4, 9, config_hash="c", data_fingerprint="d")
    (tmp_path / "first_stage.json").write_text('{"weight_hash": "w"}')
    about = {"parts": [{"sha256": "12"}, {"sha256": "34"}]}
    wanted = hashlib.sha256(b"1234").hexdigest()
    assert lineage(context, about) == {
        **{"config_hash": "c", "data_fingerprint": "d"},
        **{"first_stage": "w", "latents": wanted},
    }
