"""When checkpoints are saved, which stay, and that a fit continued from one equals a fit that never stopped."""

import runpy
import time
from pathlib import Path

import pytest
from lightning.pytorch import Callback

from sdtrain.callback.checkpoint import Checkpoint
from sdtrain.callback.evaluate import Evaluate
from sdtrain.checkpoint.commit import commit, read_manifest, verify
from sdtrain.checkpoint.files import read
from sdtrain.errors import ConfigError, RunError

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


class Steps(Callback):
    """Of each micro-batch, the optimizer steps before it."""

    def on_train_start(self, trainer, pl_module):
        self.seen = []

    def on_train_batch_start(self, trainer, *_):
        self.seen.append(trainer.global_step)


@pytest.mark.parametrize(("before", "after"), [(1, 2), (1, 4), (2, 4), (3, 2), (2, 1)])
def test_another_number_of_micro_batches_begins_with_a_whole_step(tmp_path, before, after):
    """The guard: Lightning counts micro-batches of the run so far, so the step after 3 of one would be half of one."""
    fit(tmp_path, max_steps=3, accumulate=before)
    for max_steps, start in ((5, 3), (6, 5)):
        steps_seen = Steps()
        fit(tmp_path, max_steps=max_steps, accumulate=after, resume="must", fault=steps_seen)
        assert steps_seen.seen == [step for step in range(start, max_steps) for _ in range(after)]


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


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"every_steps": 0}, "at least 1"),
        ({"every_steps": 1, "keep_last": 0}, "at least 1"),
        ({"every_steps": 4, "keep_every_steps": 6}, "keep_every_steps=6 must be a multiple of every_steps=4"),
        ({"every_steps": 4, "keep_best": {"metric": "val/loss"}}, "write {metric: val/loss, mode: min}"),
        ({"every_steps": 4, "keep_best": {"metric": "val/loss", "mode": "low"}}, "write {metric: val/loss, mode: min}"),
    ],
)
def test_bad_values(options, message):
    with pytest.raises(ConfigError, match=message):
        Checkpoint(**options)


class Measured(Evaluate):
    """Scores 3, 1, 2 at steps 2, 4, 6, and nothing between."""

    def __init__(self):
        super().__init__(every_steps=2)

    def act(self, trainer, pl_module):
        self.last_figures = {"val/loss": {2: 3.0, 4: 1.0, 6: 2.0}.get(trainer.global_step, 9.0)}
        self.last_step = trainer.global_step


def fit_with(directory, checkpoint, **options):
    return fit(directory, saving=[Measured(), checkpoint], **options)


def test_what_is_kept_beside_the_last(tmp_path):
    checkpoint = Checkpoint(1, keep_last=1, keep_every_steps=3, keep_best={"metric": "val/loss", "mode": "min"})
    fit_with(tmp_path, checkpoint, max_steps=8)
    assert steps(tmp_path) == [3, 4, 6, 8]
    assert read_manifest(tmp_path / "toy" / "checkpoints" / "step_00000004")["score"] == 1.0
    assert read_manifest(tmp_path / "toy" / "checkpoints" / "step_00000003")["score"] is None


def test_the_best_stays_through_a_resume(tmp_path):
    for max_steps in (5, 8):
        best = {"metric": "val/loss", "mode": "min"}
        fit_with(tmp_path, Checkpoint(1, keep_last=1, keep_best=best), max_steps=max_steps)
    assert steps(tmp_path) == [4, 8]


@pytest.mark.parametrize("mode", ["min", "max"])
def test_a_score_that_is_no_number_is_never_the_best(tmp_path, mode):
    """The guard: whatever is compared with NaN, the first of them would stay the best for good."""

    class NoNumber(Measured):
        def act(self, trainer, pl_module):
            super().act(trainer, pl_module)
            if trainer.global_step == 2:
                self.last_figures = {"val/loss": float("nan")}

    checkpoint = Checkpoint(2, keep_last=1, keep_best={"metric": "val/loss", "mode": mode})
    fit(tmp_path, saving=[NoNumber(), checkpoint], max_steps=10)
    assert steps(tmp_path) == [4 if mode == "min" else 8, 10]


@pytest.mark.parametrize("in_background", [False, True])
def test_a_metric_that_is_not_measured_is_told_and_the_step_is_saved(tmp_path, in_background):
    best = {"metric": "val/fid", "mode": "min"}
    with pytest.raises(ConfigError, match="keep_best.metric=val/fid is not measured here; there are val/loss"):
        fit_with(tmp_path, Checkpoint(2, keep_best=best, in_background=in_background))
    assert steps(tmp_path) == [2]


def test_in_the_background_the_same_is_saved(tmp_path):
    hashes = {}
    for in_background in (False, True):
        directory = tmp_path / str(in_background)
        hashes[in_background] = state_hash(fit_with(directory, Checkpoint(2, in_background=in_background), max_steps=7))
        assert steps(directory) == [6, 7]
        for step in (6, 7):
            verify(directory / "toy" / "checkpoints" / f"step_{step:08d}")
    assert hashes[True] == hashes[False]
    for name in ("model.safetensors", "optimizer_00000.safetensors", "training.pt"):
        first, second = (tmp_path / str(b) / "toy" / "checkpoints" / "step_00000006" / name for b in (False, True))
        assert first.read_bytes() == second.read_bytes()
    assert state_hash(fit_with(tmp_path / "True", Checkpoint(2), max_steps=9)) == state_hash(
        fit_with(tmp_path / "False", Checkpoint(2), max_steps=9)
    )


def test_training_goes_on_while_it_is_saved(tmp_path, monkeypatch):
    steps_at_commit, trainer = [], []

    class Watch(Callback):
        def on_train_batch_end(self, this, *_):
            trainer[:] = [this]

    def slow(*args, **kwargs):
        time.sleep(0.5)
        steps_at_commit.append(trainer[0].global_step)
        return commit(*args, **kwargs)

    monkeypatch.setattr("sdtrain.checkpoint.commit.commit", slow)
    rows = toy["Rows"]()
    checkpoint = Checkpoint(50, in_background=True)
    fit(tmp_path, saving=[Watch(), checkpoint], max_steps=200, tracker=rows)
    events = [row for row in rows.rows if row.get("event") == "checkpoint"]
    assert steps_at_commit[0] > 50
    assert events[0]["step"] == 50
    assert events[0]["stall_seconds"] < 0.1 < 0.5 < events[0]["seconds"]
    assert events[0]["bytes"] > 0


def test_a_stop_waits_for_what_is_saved_in_the_background(tmp_path, monkeypatch):
    def slow(*args, **kwargs):
        time.sleep(0.3)
        return commit(*args, **kwargs)

    class Stopping(Callback):
        def on_train_batch_end(self, trainer, *_):
            if trainer.global_step == 2:
                checkpoint.save(trainer)
                verify(tmp_path / "toy" / "checkpoints" / "step_00000002")
                raise RunError("stopped", 75)

    monkeypatch.setattr("sdtrain.checkpoint.commit.commit", slow)
    checkpoint = Checkpoint(2, in_background=True)
    with pytest.raises(RunError, match="stopped"):
        fit(tmp_path, saving=[checkpoint, Stopping()])


def test_a_save_that_fails_in_the_background_ends_the_run(tmp_path, monkeypatch):
    def full(*args, **kwargs):
        raise ConfigError("cannot save the checkpoint: the disk is full")

    monkeypatch.setattr("sdtrain.checkpoint.commit.commit", full)
    with pytest.raises(ConfigError, match="the disk is full"):
        fit(tmp_path, saving=[Checkpoint(2, in_background=True)], max_steps=100_000)
