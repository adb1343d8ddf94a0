"""Aspect buckets: their shapes, which one a picture takes, and cells of one shape."""

import numpy as np
import pytest

from sdtrain.data.bucket import TOO_LONG, TOO_SMALL, Buckets, deal
from sdtrain.errors import ConfigError


def side(*pairs):
    return np.array(pairs, np.int32)


@pytest.mark.parametrize(("base", "count"), [(256, 3), (384, 3), (512, 5), (768, 9), (1024, 13)])
def test_shapes_of_about_equal_area(base, count):
    shapes = Buckets().table(base).shapes
    assert len(shapes) == len(set(shapes)) == count
    assert (base, base) in shapes
    assert {shape[::-1] for shape in shapes} == set(shapes)
    for height, width in shapes:
        assert height % 64 == width % 64 == 0
        assert 0.9 * base**2 < height * width <= base**2
        assert max(height, width) <= 2 * min(height, width)


def test_shapes_of_512():
    assert Buckets().table(512).shapes == [(640, 384), (576, 448), (512, 512), (448, 576), (384, 640)]


def test_a_picture_takes_the_shape_that_keeps_most_of_it():
    table, random = Buckets(max_upscale=None).table(512), np.random.default_rng(0)
    sides = random.integers(300, 600, (500, 2))

    def kept(picture, shape):
        ratio = (picture[0] / picture[1]) / (shape[1] / shape[0])
        return min(ratio, 1 / ratio)

    for picture, number in zip(sides, table.of(sides)):
        assert kept(picture, table.shapes[number]) == max(kept(picture, shape) for shape in table.shapes)


def test_what_has_no_bucket_is_said():
    table = Buckets(max_ratio=2.0, max_upscale=1.5).table(512)
    found = table.of(side((2000, 1000), (2001, 1000), (1000, 2001), (342, 342), (341, 341), (0, 0)))
    square = table.shapes.index((512, 512))
    assert found.tolist() == [4, TOO_LONG, TOO_LONG, square, TOO_SMALL, square]
    assert Buckets(max_upscale=None).table(512).of(side((8, 8))).tolist() == [square]


def test_the_largest_base_that_needs_no_enlargement():
    for limit, tiny in ((1.0, TOO_SMALL), (None, 1)):
        table = Buckets([512, 256], max_upscale=limit, sync="group").table(0)
        shapes = [table.shapes[n] if n < TOO_LONG else n for n in table.of(side((512, 512), (511, 511), (100, 100)))]
        assert shapes == [(512, 512), (256, 256), table.shapes[tiny] if tiny == 1 else tiny]


def test_sort_out_keeps_order_and_counts():
    sides = np.tile(side((600, 600), (2000, 500), (900, 600), (40, 40)), (40_000, 1))
    kept, counts = Buckets().table(512).sort_out(sides)
    assert np.array_equal(kept, np.arange(160_000) % 2 == 0)
    assert counts["rejected/ratio"] == counts["rejected/upscale"] == 40_000
    assert counts["bucket/512x512"] == counts["bucket/384x640"] == 40_000
    assert sum(counts.values()) == 160_000


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"base": [256, 512]}, "4.27 times the area.*sync: group"),
        ({"base": 500}, "500 is no multiple of step 64"),
        ({"base": 512, "step": 0}, "at least 1"),
        ({"base": []}, r"base: \[\] is no side"),
        ({"base": "512"}, "base: '512' is no side"),
        ({"base": [512, None]}, "is no side"),
        ({"max_ratio": float("nan")}, "max_ratio: nan"),
        ({"max_ratio": 1e12, "step": 1}, "max_ratio: 1e12|max_ratio: 1000000000000"),
        ({"max_ratio": 0.5}, "max_ratio: 0.5 is not between"),
        ({"base": 512, "sync": "all"}, "none of 'none', 'group'"),
        ({"base": 4096, "step": 8, "max_ratio": 16}, "too many"),
    ],
)
def test_faults_of_the_configuration(given, said):
    with pytest.raises(ConfigError, match=said):
        Buckets(**given).table(512)


@pytest.mark.parametrize("seed", range(8))
def test_cells_have_one_bucket_and_nothing_is_lost(seed):
    random = np.random.default_rng(seed)
    cell, num_cells, num = int(random.integers(1, 5)), int(random.integers(1, 6)), int(random.integers(1, 200))
    bucket = random.choice(4, num, p=[0.6, 0.3, 0.08, 0.02]).astype(np.uint8)
    steps, rest = deal(bucket, 0, cell, num_cells, "k", seed)
    assert sorted([*steps.ravel(), *rest]) == list(range(num))
    assert rest.tolist() == sorted(rest)
    for one in steps.reshape(-1, cell):
        assert len(set(bucket[one])) == 1
        assert one.tolist() == sorted(one)  # the oldest first
    assert len(rest) <= 4 * (cell - 1) + (num_cells - 1) * cell


@pytest.mark.parametrize("seed", range(8))
def test_what_was_carried_goes_first(seed):
    random = np.random.default_rng(seed)
    bucket, num_carried = random.integers(0, 3, 90).astype(np.uint8), 20
    steps, rest = deal(bucket, num_carried, 4, 5, "k", seed)
    assert len(steps) >= 3
    for number in range(3):
        old = np.flatnonzero(bucket[:num_carried] == number)
        left = np.intersect1d(old, rest)
        assert len(left) < 4
        assert left.tolist() == old[len(old) - len(left) :].tolist()


def test_cells_of_a_block_are_mixed():
    steps, _ = deal(np.repeat([0, 1], 400).astype(np.uint8), 0, 4, 10, "k", 0)
    shares = [(step.reshape(-1, 4)[:, 0] < 400).mean() for step in steps]
    assert 0 < min(shares) < max(shares) < 1
