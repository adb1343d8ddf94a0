"""Masks to paint under: boxes, strokes or all, a function of the sample."""

import torch

from sdtrain.conditioner.mask import draw_masks
from sdtrain.ops.random import Draw


def test_they_are_masks_of_every_kind():
    masks = draw_masks(Draw.of(0, 400), 32, 48)
    assert masks.shape == (400, 1, 32, 48)
    assert set(masks.unique().tolist()) == {0, 1}
    covered = masks.mean((1, 2, 3))
    assert 0.18 < (covered == 1).float().mean() < 0.32  # a quarter covers everything
    assert (covered > 0).all()
    rest = covered[covered < 1]
    assert rest.min() < 0.05
    assert rest.max() > 0.5
    rows, columns = masks[:, 0].any(2), masks[:, 0].any(1)
    is_box = (rows[:, :, None] & columns[:, None, :]).float().sum((1, 2)) == masks.sum((1, 2, 3))
    assert 0.1 < (is_box & (covered < 1)).float().mean() < 0.4  # a single box; the rest are several, or strokes


def test_they_go_by_sample():
    ids = torch.arange(16)
    whole = draw_masks(Draw(0, ids, ids * 0), 16, 16)
    assert torch.equal(draw_masks(Draw(0, ids[5:9], ids[5:9] * 0), 16, 16), whole[5:9])
    assert not torch.equal(draw_masks(Draw(0, ids, ids * 0 + 1), 16, 16), whole)


def test_the_same_mask_at_another_resolution():
    small, large = (draw_masks(Draw.of(3, 64), side, side) for side in (32, 128))
    pooled = torch.nn.functional.avg_pool2d(large, 4)
    assert ((pooled - small).abs() > 0.9).float().mean() < 0.01


def test_the_whole_share():
    assert draw_masks(Draw.of(0, 32), 8, 8, whole=1.0).all()
    assert (draw_masks(Draw.of(0, 200), 16, 16, whole=0.0).mean((1, 2, 3)) < 1).float().mean() > 0.9
