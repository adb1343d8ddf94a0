"""Lightning's saves and loads go through the commit protocol."""

import runpy
from pathlib import Path

import pytest
import torch

from sdtrain.checkpoint.commit import find_resume, manifest_hash, read_manifest, verify
from sdtrain.errors import RunError
from sdtrain.strategy.commit_io import CommitIO

toy = runpy.run_path(str(Path(__file__).parents[1] / "fault" / "toy_run.py"))


def save(io, path, step=3):
    rest = {"global_step": step, "sdtrain": {"images": 12, "world_size": 2}}
    io.save_checkpoint({**rest, "state_dict": {"w": torch.arange(3.0)}, "ema": {"w": torch.ones(3)}}, path)


def test_save_and_load(tmp_path):
    save(CommitIO(), tmp_path / "step_3")
    manifest = read_manifest(tmp_path / "step_3")
    assert (manifest["step"], manifest["images"], manifest["world_size"], manifest["parent"]) == (3, 12, 2, "")
    back = CommitIO().load_checkpoint(tmp_path / "step_3")
    assert torch.equal(back["state_dict"]["w"], torch.arange(3.0))
    assert torch.equal(back["ema"]["w"], torch.ones(3))
    assert back["global_step"] == 3


def test_each_checkpoint_names_the_one_it_continues(tmp_path):
    io = CommitIO()
    save(io, tmp_path / "step_1", 1)
    save(io, tmp_path / "step_2", 2)
    assert read_manifest(tmp_path / "step_2")["parent"] == manifest_hash(tmp_path / "step_1")
    io = CommitIO()
    io.load_checkpoint(tmp_path / "step_1")
    save(io, tmp_path / "step_3", 3)
    assert read_manifest(tmp_path / "step_3")["parent"] == manifest_hash(tmp_path / "step_1")


def test_nothing_is_unpickled_before_its_hash_is_verified(tmp_path, monkeypatch):
    save(CommitIO(), tmp_path / "step_3")
    content = bytearray((tmp_path / "step_3" / "training.pt").read_bytes())
    content[len(content) // 2] ^= 1
    (tmp_path / "step_3" / "training.pt").write_bytes(content)
    monkeypatch.setattr(torch, "load", lambda *args, **kwargs: pytest.fail("torch.load was called"))
    with pytest.raises(RunError, match="training.pt is not what was written") as raised:
        CommitIO().load_checkpoint(tmp_path / "step_3")
    assert raised.value.exit_code == 3


def test_what_was_found_is_verified_once_and_only_once(tmp_path, monkeypatch):
    save(CommitIO(), tmp_path / "step_3")
    calls = []
    monkeypatch.setattr("sdtrain.checkpoint.commit.verify", lambda path: calls.append(path))
    path = find_resume(tmp_path, "auto")
    for _ in range(2):
        CommitIO().load_checkpoint(path)
    assert calls == [path, path]  # where it was found, and the second load


def test_remove(tmp_path):
    save(CommitIO(), tmp_path / "step_3")
    CommitIO().remove_checkpoint(tmp_path / "step_3")
    assert not (tmp_path / "step_3").exists()


def test_lightning_saves_through_it(tmp_path):
    trainer = toy["fit"](tmp_path, max_steps=2)
    path = tmp_path / "toy" / "checkpoints" / "step_00000002"
    verify(path)
    weight = trainer.lightning_module.layer.weight
    back = CommitIO().load_checkpoint(path)
    assert torch.equal(back["state_dict"]["layer.weight"], weight)
    assert torch.equal(back["ema"]["layer.weight"], weight / 2)
