"""The order: a pure function of seed and number of samples."""

import hashlib

import numpy as np
import pytest

from sdtrain.data.plan import Plan, epoch_order
from sdtrain.errors import ConfigError


def test_golden_order():
    """A checkpoint of last year continues with the same samples: these numbers never change."""
    assert epoch_order(8, 0, 0).tolist() == [0, 2, 1, 5, 4, 3, 6, 7]
    digest = hashlib.sha256(epoch_order(10_000, 7, 3).astype("<i8").tobytes()).hexdigest()
    assert digest == "26b0fe0729d6daad947ffacf6e68fbd8631ae03ba14badfd46895fb865fe4d56"


def test_every_epoch_has_every_sample_once():
    plan = Plan(num_samples=10, seed=3, global_batch_size=4)
    ids, epochs = (np.concatenate(values) for values in zip(*(plan.take(step) for step in range(10))))
    for epoch in range(4):
        assert sorted(ids[epochs == epoch]) == list(range(10))
    assert epochs.tolist() == sorted(epochs.tolist())
    assert ids[:10].tolist() != ids[10:20].tolist()


def test_seeds_differ():
    assert Plan(1000, 0, 64).take(0)[0].tolist() != Plan(1000, 1, 64).take(0)[0].tolist()


@pytest.mark.parametrize("num_samples", [1, 3, 7])
def test_fewer_samples_than_a_batch(num_samples):
    ids, epochs = Plan(num_samples, 0, 16).take(5)
    pairs = list(zip(ids.tolist(), epochs.tolist()))
    assert len(set(pairs)) == 16
    assert set(ids.tolist()) == set(range(num_samples))
    assert set(epochs.tolist()) == set(range(80 // num_samples, 95 // num_samples + 1))


@pytest.mark.parametrize(("world", "num_accumulate"), [(1, 1), (2, 1), (1, 4), (4, 3)])
def test_ranks_and_micro_batches_make_up_the_step(world, num_accumulate):
    plan = Plan(100, 0, 24)
    parts = [part for rank in range(world) for part in plan.micro_batches(9, rank, world, num_accumulate)]
    assert {len(ids) for ids, _ in parts} == {24 // world // num_accumulate}
    for joined, whole in zip((np.concatenate(values) for values in zip(*parts)), plan.take(9)):
        assert np.array_equal(joined, whole)


def test_batch_that_does_not_divide_says_what_would():
    with pytest.raises(ConfigError, match=r"24 .*5 ranks.*\[1, 2, 3, 4, 6, 8, 12, 24\]"):
        Plan(100, 0, 24).micro_batches(0, 0, 5, 1)


def test_state_goes_back_to_its_step():
    plan = Plan(100, 5, 24, "abc")
    assert plan.state(17) == {"v": 1, "step": 17, "seed": 5, "global_batch": 24, "fingerprint": "abc"}
    assert plan.step_of(plan.state(17)) == 17


@pytest.mark.parametrize(
    ("other", "field"),
    [
        (Plan(100, 6, 24, "abc"), "seed"),
        (Plan(100, 5, 32, "abc"), "global_batch"),
        (Plan(100, 5, 24, "abd"), "fingerprint"),
    ],
)
def test_state_of_another_order_is_refused_by_name(other, field):
    with pytest.raises(ConfigError, match=f"data.{field}"):
        Plan(100, 5, 24, "abc").step_of(other.state(3))
    with pytest.raises(ConfigError, match="data.v"):
        Plan(100, 5, 24, "abc").step_of({})
