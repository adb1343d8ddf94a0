"""Training rows of a real fit: when they are written, and that their numbers are about training alone."""

import time

import pytest
from lightning.pytorch import Callback

from sdtrain.callback.evaluate import Evaluate
from sdtrain.callback.log import Log, off_the_clock
from sdtrain.errors import ConfigError


class SaveAt(Callback):
    def __init__(self, step, path):
        self.step, self.path = step, path

    def on_train_batch_end(self, trainer, pl_module, *_):
        if trainer.global_step == self.step and not self.path.exists():
            trainer.save_checkpoint(self.path)


class Slow(Callback):
    def on_train_batch_end(self, trainer, *_):
        if trainer.global_step % 4 == 0:
            with off_the_clock(trainer):
                time.sleep(0.5)


class StopAt(Callback):
    def on_train_batch_end(self, trainer, pl_module, *_):
        trainer.should_stop = trainer.global_step == 4


def test_rows_at_every_interval_and_at_the_last_step(tiny_fit):
    stage = tiny_fit([Log(every_steps=3)], max_steps=7)
    rows = stage.context.tracker.rows
    assert [row["step"] for row in rows] == [3, 6, 7]
    assert [row["images"] for row in rows] == [12, 24, 28]
    assert [row["num_losses"] for row in rows] == [3, 3, 1]
    assert stage.asked == [("metrics", 3), ("metrics", 6), ("metrics", 7)]
    assert list(rows[0])[:4] == ["stage", "step", "images", "loss"]
    for row in rows:
        assert row["stage"] == "tiny"
        assert row["images_per_second"] > 0
        assert 0 <= row["data_wait_fraction"] <= 1
        assert 1e7 < row["peak_memory_bytes"] < 1e11
    assert rows[0]["seconds"] <= rows[1]["seconds"] <= rows[2]["seconds"] > 0


def test_the_learning_rate_is_the_one_the_step_was_made_with(tiny_fit):
    row = tiny_fit([Log(every_steps=3)], max_steps=3).context.tracker.rows[0]
    assert row["lr/weight"] == pytest.approx(3e-4)  # the schedule's third value; after the step it stands at the fourth
    assert row["lr/bias"] == pytest.approx(3e-5)


def test_micro_batches_are_not_steps(tiny_fit):
    stage = tiny_fit([Log(every_steps=2)], max_steps=4, accumulate=3)
    assert [(row["step"], row["num_losses"]) for row in stage.context.tracker.rows] == [(2, 6), (4, 6)]


def test_speed_leaves_out_evaluation_and_counts_the_wait_for_data(tiny_fit):
    callbacks = [Slow(), Log(every_steps=5), Evaluate(every_steps=3)]  # before it and after it
    stage = tiny_fit(callbacks, max_steps=10, wait_seconds=0.01, evaluate_seconds=0.5)
    first, second = (row for row in stage.context.tracker.rows if "loss" in row)
    assert second["seconds"] - first["seconds"] > 1.5  # an evaluation at 6 and 9, the slow one at 8
    assert 0.01 < second["step_seconds"] < 0.1
    assert 4 / 0.1 < second["images_per_second"] < 4 / 0.01
    assert second["data_wait_fraction"] > 0.5
    stage = tiny_fit([Log(every_steps=10), Slow()], max_steps=10, compute_seconds=0.01)
    assert stage.context.tracker.rows[0]["data_wait_fraction"] < 0.3


def test_a_fit_that_is_stopped_tells_its_last_steps(tiny_fit):
    stage = tiny_fit([Log(every_steps=3), StopAt()], max_steps=100)
    assert [(row["step"], row["num_losses"]) for row in stage.context.tracker.rows] == [(3, 3), (4, 1)]


@pytest.mark.parametrize("accumulate", [1, 2])
def test_a_resumed_fit_goes_on_counting(tiny_fit, tmp_path, accumulate):
    path = tmp_path / "state.ckpt"
    whole = tiny_fit([Log(every_steps=2), SaveAt(5, path)], max_steps=8, accumulate=accumulate, wait_seconds=0.02)
    stage = tiny_fit([Log(every_steps=2)], max_steps=8, resume=path, accumulate=accumulate)
    rows, whole_rows = stage.context.tracker.rows, whole.context.tracker.rows
    assert [(row["step"], row["num_losses"]) for row in rows] == [(6, accumulate), (8, 2 * accumulate)]
    assert [row["images"] for row in rows] == [row["images"] for row in whole_rows[2:]]
    assert rows[0]["seconds"] > whole_rows[1]["seconds"]
    assert rows[1]["loss"] == whole_rows[3]["loss"]
    assert rows[1]["lr/weight"] == whole_rows[3]["lr/weight"]


def test_an_interval_of_nothing_is_refused():
    with pytest.raises(ConfigError, match="log.every_steps=0 must be 1 or more"):
        Log(every_steps=0)


def looking(stage):
    return next(c for c in stage.trainer.callbacks if isinstance(c, Log)).summary()["looking"]


def test_the_summary_says_what_looking_took(tiny_fit, tmp_path):
    path = tmp_path / "state.ckpt"
    stage = tiny_fit([Log(every_steps=2), Evaluate(every_steps=2), SaveAt(3, path)], evaluate_seconds=0.05, max_steps=4)
    found = looking(stage)
    assert found["seconds"].keys() == {"validation"}
    assert found["seconds"]["validation"] >= 0.1
    assert 0 < found["share"] <= 1
    resumed = looking(tiny_fit([Log(every_steps=2), Evaluate(every_steps=9)], max_steps=4, resume=path))
    assert 0.05 <= resumed["seconds"]["validation"] < found["seconds"]["validation"] + 0.05  # of the first process


@pytest.mark.parametrize(("before", "is_told"), [(599.0, False), (4000.0, False), (700.0, True)])
def test_a_long_stage_that_looks_much_says_so_once(tiny_fit, capsys, before, is_told):
    """30 s of 4000 s are less than 3 %, and ten minutes are too short to mind."""
    log = Log(every_steps=2)
    log.load_state_dict({"seconds": before, "looking_seconds": {"validation": 20.0, "save": 10.0}})
    (_, *told) = tiny_fit([log], max_steps=2).context.tracker.rows
    line = "tiny: looking took 4.3% of the time (validation 20 s, save 10 s); raise callback.*.every_steps"
    assert told == ([{"stage": "tiny", "step": 2, "event": "warning", "warning": line}] if is_told else [])
    assert capsys.readouterr().out == (f"warning: {line}\n" if is_told else "")
