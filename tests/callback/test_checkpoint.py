"""When checkpoints are saved, which stay, and that a fit continued from one equals a fit that never stopped."""

import runpy
from pathlib import Path

import pytest

from sdtrain.callback.checkpoint import Checkpoint
from sdtrain.checkpoint.commit import read_manifest
from sdtrain.checkpoint.files import read
from sdtrain.errors import ConfigError

toy = runpy.run_path(str(Path(__file__).parents[1] / "fault" / "toy_run.py"))
fit, state_hash = toy["fit"], toy["state_hash"]


def steps(directory):
    return sorted(int(path.name[5:]) for path in (directory / "toy" / "checkpoints").iterdir())


def test_saved_every_few_steps_and_at_the_end(tmp_path):
    fit(tmp_path, max_steps=7, every_steps=3, keep_last=9)
    assert steps(tmp_path) == [3, 6, 7]


def test_the_last_are_kept(tmp_path):
    fit(tmp_path, max_steps=7, every_steps=1, keep_last=3)
    assert steps(tmp_path) == [5, 6, 7]


def test_never_within_an_accumulation(tmp_path):
    trainer = fit(tmp_path, max_steps=4, every_steps=2, keep_last=9, accumulate=3)
    assert steps(tmp_path) == [2, 4]
    assert trainer.fit_loop.epoch_loop.total_batch_idx == 11
    manifest = read_manifest(tmp_path / "toy" / "checkpoints" / "step_00000002")
    assert manifest["images"] == 2 * 3 * 4


def test_the_manifest_says_what_it_is_of(tmp_path):
    fit(tmp_path, max_steps=2)
    manifest = read_manifest(tmp_path / "toy" / "checkpoints" / "step_00000002")
    told = {key: manifest[key] for key in ("step", "images", "world_size", "config_hash", "data_fingerprint")}
    assert told == {"step": 2, "images": 8, "world_size": 1, "config_hash": "c", "data_fingerprint": "d"}


@pytest.mark.parametrize("accumulate", [1, 3])
@pytest.mark.parametrize("half", [4, 5])
def test_two_halves_equal_the_whole(tmp_path, half, accumulate):
    whole = state_hash(fit(tmp_path / "whole", max_steps=9, accumulate=accumulate))
    first = state_hash(fit(tmp_path / "halves", max_steps=half, accumulate=accumulate))
    second = state_hash(fit(tmp_path / "halves", max_steps=9, accumulate=accumulate, resume="must"))
    assert second == whole != first


def test_the_last_step_is_saved_as_a_longer_fit_saves_it(tmp_path):
    saved = []
    for max_steps, every_steps in ((5, 100), (6, 5)):
        fit(tmp_path / str(max_steps), max_steps=max_steps, every_steps=every_steps)
        path = tmp_path / str(max_steps) / "toy" / "checkpoints" / "step_00000005"
        saved.append({name: read(path)[name] for name in ("epoch", "global_step", "loops", "lr_schedulers")})
    assert saved[0] == saved[1]


def test_a_finished_fit_run_again_changes_nothing(tmp_path):
    done = state_hash(fit(tmp_path, max_steps=4))
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
    assert state_hash(fit(tmp_path, max_steps=4)) == done
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")} == before


def test_a_fit_that_ends_by_epochs_is_saved_too(tmp_path):
    fit(tmp_path, max_steps=-1, every_steps=4, limit_train_batches=5, max_epochs=1)
    assert steps(tmp_path) == [4, 5]


def test_starting_anew_replaces_the_old_line(tmp_path):
    fit(tmp_path, max_steps=8)
    fit(tmp_path, max_steps=2, resume="never")
    assert steps(tmp_path) == [2]


@pytest.mark.parametrize("options", [{"every_steps": 0}, {"every_steps": 1, "keep_last": 0}])
def test_bad_values(options):
    with pytest.raises(ConfigError, match="at least 1"):
        Checkpoint(**options)
