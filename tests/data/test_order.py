"""Permutations that never change, and a source's endless order."""

import hashlib

import numpy as np
import pytest

from sdtrain.data.order import Order, permutation


def order(*sizes, name="x"):
    return Order(name, np.cumsum([0, *sizes]))


def test_golden_permutation():
    """A checkpoint of last year continues with the same samples: these numbers never change."""
    assert permutation(8, "k").tolist() == [0, 7, 6, 2, 1, 5, 4, 3]
    digest = hashlib.sha256(permutation(100_000, "7/pool", 3, 2).astype("<i8").tobytes()).hexdigest()
    assert digest == "6acfe7913268c5c3d7dce4f21c2524b9585642bfc5a92b83bdaa6d613bda3996"


@pytest.mark.parametrize("num", [0, 1, 2, 3, 31, 32, 33, 1000])
def test_everything_once(num):
    assert sorted(permutation(num, "k").tolist()) == list(range(num))


def test_every_argument_counts():
    given = [("k", 0, 0), ("l", 0, 0), ("k", 1, 0), ("k", 0, 1)]
    assert len({tuple(permutation(50, *arguments).tolist()) for arguments in given}) == 4


def test_places_are_as_likely_as_each_other():
    where = np.array([permutation(5, "k", number).tolist() for number in range(4000)])
    for value in range(5):
        assert (np.abs((where == value).mean(0) - 0.2) < 0.03).all()


def test_any_part_of_the_order_is_a_part_of_the_whole():
    source = order(3, 0, 5, 1, 7)
    whole = source.take(4, 0, 70)
    for first in range(0, 60, 7):
        for last in (first, first + 1, first + 9):
            assert np.array_equal(source.take(4, first, last), whole[first:last])


def test_an_epoch_has_every_sample_once_and_shard_after_shard():
    source = Order("x", np.array([100, 103, 103, 108, 115]))
    taken = source.take(4, 0, 45)
    assert taken[:, 1].tolist() == [0] * 15 + [1] * 15 + [2] * 15
    shards = []
    for epoch in range(3):
        ids = taken[taken[:, 1] == epoch, 0]
        assert sorted(ids) == list(range(100, 115))
        of = np.searchsorted(source.starts, ids, side="right")
        assert (np.diff(of) != 0).sum() == 2  # no shard is come back to
        shards.append(tuple(of))
    assert len(set(shards)) > 1


def test_names_and_seeds_differ():
    takes = [order(40, 40, name=name).take(seed, 0, 80)[:, 0].tolist() for name in "xy" for seed in (0, 1)]
    assert len({tuple(take) for take in takes}) == 4
