"""Grids of a real fit: when they are drawn and where they lie."""

import numpy as np
from PIL import Image

from sdtrain.callback.samples import Samples


def test_a_grid_before_the_first_step_then_regularly_then_at_the_end(tiny_fit, tmp_path):
    stage = tiny_fit([Samples(every_steps=4)], max_steps=6)
    folder = tmp_path / "tiny" / "samples"
    names = [f"step_{step:08d}.png" for step in (0, 4, 6)]
    assert sorted(path.name for path in folder.iterdir()) == names
    assert [(name, path, step) for name, path, step, _ in stage.context.tracker.images] == [
        ("tiny/samples", folder / name, step) for name, step in zip(names, (0, 4, 6))
    ]
    captions = stage.context.tracker.images[0][3]
    assert captions[:2] == ["a small red star above a big blue ring", "original"]
    assert len(captions[2]) == 200
    pixels = np.asarray(Image.open(folder / "step_00000006.png"))
    assert (pixels == 6).all(-1).sum() >= 3 * 128 * 128


def test_a_resumed_fit_does_not_draw_again_where_it_starts(tiny_fit, tmp_path):
    tiny_fit([], max_steps=3).trainer.save_checkpoint(tmp_path / "state.ckpt")
    stage = tiny_fit([Samples(every_steps=4)], max_steps=6, resume=tmp_path / "state.ckpt")
    assert stage.asked == [("preview", 4), ("preview", 6)]


def test_a_stage_with_nothing_to_show_draws_nothing(tiny_fit, tmp_path):
    stage = tiny_fit([Samples(every_steps=1)], max_steps=2, preview=False)
    assert stage.asked == [("preview", 0), ("preview", 1), ("preview", 2)]
    assert stage.context.tracker.images == []
    assert not (tmp_path / "tiny").exists()
