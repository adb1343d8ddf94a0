"""Figures on held-out data at their steps, with the averaged weights."""

from lightning.pytorch import Callback

from sdtrain.callback.evaluate import Evaluate
from sdtrain.callback.log import Log


class Averaged(Callback):
    """Something is averaged."""

    def on_train_start(self, trainer, pl_module):
        pl_module.ema = object()


def test_figures_every_interval_and_at_the_end(tiny_fit):
    evaluate = Evaluate(every_steps=4)
    stage = tiny_fit([evaluate], max_steps=6)
    rows = stage.context.tracker.rows
    assert [(row["step"], row["images"], row["val/psnr"]) for row in rows] == [(4, 16, 24.0), (6, 24, 26.0)]
    assert stage.asked == [("evaluate", 4), ("evaluate", 6)]
    assert evaluate.last_figures == {"val/psnr": 26.0}
    assert not stage.is_averaged


def test_the_trained_weights_are_measured_too_where_others_are_evaluated(tiny_fit):
    evaluate = Evaluate(every_steps=2)
    (row,) = tiny_fit([Averaged(), evaluate], max_steps=2).context.tracker.rows
    assert (row["val/psnr"], row["val_raw/psnr"]) == (22.0, 12.0)
    assert evaluate.last_figures == {"val/psnr": 22.0, "val_raw/psnr": 12.0}


def test_figures_of_drawn_pictures_are_of_the_average_too_and_cost_as_the_others(tiny_fit):
    evaluate, log = Evaluate(every_steps=2), Log(every_steps=2)
    rows = tiny_fit([evaluate, log], max_steps=2, compared={"val/fid": 50.0}).context.tracker.rows
    assert [row["val/fid"] for row in rows if "val/fid" in row] == [50.0]
    assert evaluate.last_figures == {"val/psnr": 22.0, "val/fid": 50.0}
    assert log.summary()["looking"]["seconds"].keys() == {"validation"}


def test_once_where_the_last_step_is_also_an_interval(tiny_fit):
    assert tiny_fit([Evaluate(every_steps=3)], max_steps=6).asked == [("evaluate", 3), ("evaluate", 6)]


def test_last_figures_survive_a_resume_of_a_finished_fit(tiny_fit, tmp_path):
    evaluate = Evaluate(every_steps=2)
    stage = tiny_fit([evaluate], max_steps=4)
    stage.trainer.save_checkpoint(tmp_path / "state.ckpt")
    again = Evaluate(every_steps=2)
    assert tiny_fit([again], max_steps=4, resume=tmp_path / "state.ckpt").asked == []
    assert again.last_figures == evaluate.last_figures == {"val/psnr": 24.0}


def test_a_stage_without_figures_writes_no_row(tiny_fit):
    stage = tiny_fit([Evaluate(every_steps=2)], max_steps=2, figures=False)
    assert stage.asked == [("evaluate", 2)]
    assert stage.context.tracker.rows == []
