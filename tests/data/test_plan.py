"""The plan: the order of all samples, the places to stop and go on, and how ranks share a step."""

import hashlib
import itertools
import json
import time
import tracemalloc
from collections import Counter
from dataclasses import replace
from fractions import Fraction
from types import SimpleNamespace

import numpy as np
import pytest

from sdtrain.data.bucket import Buckets
from sdtrain.data.order import Order
from sdtrain.data.plan import START, Layout, Plan
from sdtrain.errors import ConfigError

SIDES = np.array([(800, 800), (800, 600), (600, 800), (1200, 720)], np.int32)


def orders(*num_samples, shard=7):
    """Sources of so many samples, in shards of `shard`."""
    found, first = [], 0
    for name, num in zip("abcd", num_samples):
        found.append(Order(name, np.unique([*range(first, first + num, shard), first + num])))
        first += num
    return found


def plan(*num_samples, size=8, seed=3, **options):
    options.setdefault("weights", tuple(Fraction(1) for _ in num_samples))
    return Plan(orders(*num_samples), seed, size, **options)


def bucketed(num_samples, size=24, cell=4, shares=(0.55, 0.25, 0.17, 0.03), is_synchronous=False, **options):
    """A plan whose samples have four shapes, the last of them rare."""
    side = SIDES[np.random.default_rng(5).choice(4, num_samples, p=shares)]
    layout = Layout(Buckets().table(512), SimpleNamespace(side=side), cell, is_synchronous)
    return plan(num_samples, size=size, layout=layout, **options)


PLANS = {
    "large": lambda: plan(100, block_samples=24),
    "small": lambda: plan(21),
    "tiny": lambda: plan(3, size=16),
    "one": lambda: plan(1, size=5),
    "sources": lambda: plan(50, 9, 30, block_samples=40, weights=(Fraction(5, 10), Fraction(2, 10), Fraction(3, 10))),
    "buckets": lambda: bucketed(150, block_samples=100),
    "groups": lambda: bucketed(150, cell=12, is_synchronous=True, block_samples=100),
}
every_plan = pytest.mark.parametrize("made", PLANS.values(), ids=PLANS)


def steps(of, num, cursor=START):
    return list(itertools.islice(of.walk(cursor), num))


def refs(taken):
    return [step.tolist() for step, _ in taken]


@pytest.mark.parametrize(
    ("name", "digest"),
    [
        ("large", "9c08782d8792a7e1"),
        ("tiny", "2c9740d939b320c4"),
        ("sources", "49c832c9a89e247d"),
        ("buckets", "d35212b409236a3f"),
        ("groups", "033b53fa93343d21"),
    ],
)
def test_golden_order(name, digest):
    """A checkpoint of last year continues with the same samples: these numbers never change."""
    taken = np.concatenate([step for step, _ in steps(PLANS[name](), 40)])
    assert hashlib.sha256(taken.astype("<i8").tobytes()).hexdigest()[:16] == digest


@every_plan
def test_every_sample_once_in_every_epoch_of_its_source(made):
    here = made()
    taken = Counter(tuple(ref) for step in refs(steps(here, 150)) for ref in step)
    assert set(taken.values()) == {1}
    latest = max(epoch for _, epoch in taken)
    for order in here.orders:
        epochs = sorted({epoch for sample, epoch in taken if order.starts[0] <= sample < order.starts[-1]})
        assert epochs == list(range(len(epochs)))
        # A block holds at most the end of an epoch and what follows; what is carried may be older.
        late = 2 + here.pool_samples // len(order) + (10 if here.layout else 0)
        for epoch in epochs[: len(epochs) - late]:
            samples = [sample for sample, of in taken if of == epoch and order.starts[0] <= sample < order.starts[-1]]
            assert sorted(samples) == list(range(order.starts[0], order.starts[-1]))
    assert latest > 2


def test_a_small_set_is_gone_through_epoch_by_epoch():
    epochs = [epoch for step in refs(steps(plan(21), 40)) for _, epoch in step]
    assert epochs == [place // 21 for place in range(320)]


def test_seeds_differ():
    assert refs(steps(plan(100, seed=0), 1)) != refs(steps(plan(100, seed=1), 1))


@every_plan
@pytest.mark.parametrize("stop", range(0, 26))
def test_stopped_anywhere_it_goes_on_as_if_it_had_not(made, stop):
    here, num = made(), 40
    whole = steps(here, num)
    state = json.loads(json.dumps(here.state(whole[stop - 1][1] if stop else START)))
    again, cursor = made().resume(state)
    assert again.state(cursor) == state
    first = steps(again, 5, cursor)
    assert refs(first) == refs(whole[stop : stop + 5])
    once_more, cursor = made().resume(json.loads(json.dumps(again.state(first[-1][1]))))
    rest = steps(once_more, num - stop - 5, cursor)
    assert refs(rest) == refs(whole[stop + 5 :])
    assert [here.state(c) for _, c in first + rest] == [here.state(c) for _, c in whole[stop:]]


def test_first_and_last_step_of_a_block_are_among_those():
    for name in ("large", "buckets", "groups"):
        cursors = [cursor for _, cursor in steps(PLANS[name](), 25)]
        ends = [a for a, b in zip(cursors, cursors[1:]) if b["step_in_block"] == 1]
        assert len(ends) >= 3, name
        assert all(cursor["step_in_block"] > 1 for cursor in ends)


@pytest.mark.parametrize("seed", range(30))
def test_whatever_the_sizes(seed):
    random = np.random.default_rng(seed)
    nums = random.integers(1, 60, random.integers(1, 4)).tolist()
    weights = tuple(Fraction(int(random.integers(1, 20)), 20) for _ in nums)
    cell, num_cells = int(random.integers(1, 4)), int(random.integers(1, 5))
    size, block = cell * num_cells, int(random.integers(20, 90))
    side = SIDES[random.integers(0, 4, sum(nums))]
    layout = Layout(Buckets().table(512), SimpleNamespace(side=side), cell) if seed % 2 else None
    here = plan(*nums, size=size, weights=weights, block_samples=block, layout=layout, seed=seed)
    taken = steps(here, 60)
    pairs = [tuple(ref) for step in refs(taken) for ref in step]
    assert len(set(pairs)) == len(pairs) == 60 * size
    stop = int(random.integers(1, 59))
    again, cursor = here.resume(here.state(taken[stop - 1][1]))
    assert refs(steps(again, 60 - stop, cursor)) == refs(taken[stop:])
    if layout is None:
        last = taken[-1][1]["block"]
        served = set(pairs)
        for earlier in range(last):
            assert {tuple(ref) for ref in here.pool(earlier).tolist()} <= served


@pytest.mark.parametrize(
    "weights", [("0.7", "0.2", "0.1"), ("1/3", "1/3", "1/3"), ("0.05", "0", "0.95"), ("7", "1", "3")]
)
def test_weights_are_exact(weights):
    weights = tuple(map(Fraction, weights))
    here = plan(50, 90, 30, weights=weights, block_samples=64)
    counts = np.zeros(3, int)
    for block in range(60):
        sources = np.searchsorted([50, 140], here.pool(block)[:, 0], side="right")
        counts += np.bincount(sources, minlength=3)
        given = (block + 1) * here.pool_samples
        assert counts.tolist() == here.given(block + 1)
        assert counts.sum() == given
        for count, weight in zip(counts, weights):
            assert abs(count - given * weight / sum(weights)) < 1


def test_a_weight_so_small_that_a_block_grows_for_it():
    assert plan(6, 6, weights=(Fraction(99), Fraction(1))).pool_samples == 100
    with pytest.raises(ConfigError, match=r"a weight of 0.002 gives less than one sample in a block of 400"):
        plan(6, 6, weights=(Fraction(499), Fraction(1)), block_samples=400)


def test_other_weights_begin_at_the_next_block():
    half = (Fraction(1, 2), Fraction(1, 2))
    before = plan(40, 60, weights=half, block_samples=32)
    whole = steps(before, 100)
    cursor = whole[9][1]
    assert (cursor["block"], cursor["step_in_block"]) == (2, 2)
    after, cursor = replace(before, weights=(Fraction(1), Fraction(3)), segments=()).resume(before.state(cursor))
    assert [tuple(segment) for segment in after.segments] == [(0, half), (3, (1, 3))]
    rest = steps(after, 90, cursor)
    assert refs(rest[:2]) == refs(whole[10:12])  # the rest of the block is what it was
    pairs = [tuple(ref) for step in refs(whole[:10] + rest) for ref in step]
    assert len(set(pairs)) == len(pairs)
    first_source = [sample < 40 for sample, _ in pairs[3 * 32 :]]
    assert abs(sum(first_source) - len(first_source) / 4) <= 8
    for source in (range(40), range(40, 100)):  # no epoch begins before the one before is done
        for epoch in range(3):
            assert {sample for sample, of in pairs if of == epoch and sample in source} == set(source)
    # and it goes on so, and can be changed again, also within the block
    again, cursor = replace(after, segments=()).resume(after.state(rest[20][1]))
    assert again.segments == after.segments
    assert refs(steps(again, 5, cursor)) == refs(rest[21:26])
    third = replace(after, weights=half, segments=()).resume(after.state(whole[9][1]))[0]
    assert [segment.block for segment in third.segments] == [0, 3]
    assert third.segments[1].weights == half


def test_other_weights_before_the_first_step():
    first = plan(40, 60, weights=(Fraction(1), Fraction(1)))
    second = plan(40, 60, weights=(Fraction(1), Fraction(2)))
    assert second.resume(first.state(START))[0].segments == second.segments


@every_plan
@pytest.mark.parametrize("seed", range(3))
def test_ranks_and_micro_batches_make_up_the_step(made, seed):
    here = made()
    groups = here.global_batch_size // here.layout.cell if here.layout and here.layout.is_synchronous else 1
    counts = range(1, here.global_batch_size + 1)
    step, _ = steps(here, seed + 1)[-1]
    tried = 0
    for world, num_accumulate in itertools.product(counts, counts):
        try:
            here.check_split(world, num_accumulate)
        except ConfigError:
            continue
        tried += 1
        ranks = [here.micro_batches(step, rank, world, num_accumulate) for rank in range(world)]
        assert {len(part.ids) for parts in ranks for part in parts} == {len(step) // world // num_accumulate}
        assert {len(parts) for parts in ranks} == {num_accumulate}
        shares = [np.concatenate([part.ids for part in parts]).reshape(groups, -1) for parts in ranks]
        assert np.concatenate(shares, axis=1).ravel().tolist() == step[:, 0].tolist()
        if here.layout:
            for part in itertools.chain(*ranks):
                shapes = {here.layout.table.shapes[number] for number in here.layout.bucket(part.ids)}
                assert shapes == {part.size}
            if here.layout.is_synchronous:
                assert all(len({part.size for part in parts}) == 1 for parts in zip(*ranks))
        else:
            assert {part.size for parts in ranks for part in parts} == {None}
    assert tried > 1


@pytest.mark.parametrize(
    ("here", "world", "num_accumulate", "said"),
    [
        (
            plan(100, size=24),
            5,
            1,
            r"24 samples a step do not divide among 5 ranks.*one of \[1, 2, 3, 4, 6, 8, 12, 24\]",
        ),
        (bucketed(50), 4, 1, r"24 samples a step in cells of 4.*ranks may be one of \[6, 12, 24\].*one of \[3, 6\]"),
        (
            bucketed(50, cell=12, is_synchronous=True),
            2,
            1,
            r"may be one of \[\]; with 2 ranks .* one of \[2, 4, 6, 12\]",
        ),
    ],
)
def test_batch_that_does_not_divide_says_what_would(here, world, num_accumulate, said):
    with pytest.raises(ConfigError, match=said):
        here.check_split(world, num_accumulate)


def test_batch_of_no_whole_cells_is_refused():
    with pytest.raises(ConfigError, match=r"24 samples a step are no multiple of data.buckets.cell, 5"):
        bucketed(50, cell=5)


@pytest.mark.parametrize("cell", [1, 3, 8])
def test_what_is_carried_is_bounded_and_the_rare_are_served(cell):
    here = bucketed(400, size=24, cell=cell, shares=(0.6, 0.3, 0.095, 0.005), block_samples=96)
    is_rare = here.layout.bucket(np.arange(400)) == here.layout.bucket(np.arange(400)).max()
    num_rare = int(is_rare.sum())
    assert 0 < num_rare < 8
    taken = steps(here, 400)
    for _, cursor in taken:
        assert len(cursor["carry"].split()) <= 4 * (cell - 1) + 24 - cell
    served = [(epoch, step) for step, taken in enumerate(refs(taken)) for sample, epoch in taken if is_rare[sample]]
    assert len(served) > num_rare * (400 * 24 / 400 - 1) - 2 * cell
    # a sample waits for as many others as fill its cell, and a block
    assert all(step < 400 / 24 * (epoch + 1 + cell / num_rare) + 2 * 96 / 24 for epoch, step in served)


def test_state_is_small_and_plain():
    here = plan(100, seed=5, size=24, fingerprint="abc", block_samples=48)
    assert here.state(steps(here, 17)[-1][1]) == {
        "v": 2,
        "seed": 5,
        "global_batch": 24,
        "buckets": None,
        "buckets.cell": None,
        "fingerprint": "abc",
        "block_samples": 48,
        "segments": [[0, ["1"]]],
        "step": 17,
        "block": 8,
        "step_in_block": 1,
        "carry": "",
    }


def test_state_of_buckets_stays_small():
    here = bucketed(5000, size=256, cell=16)
    sizes = [len(json.dumps(here.state(cursor))) for _, cursor in steps(here, 60)]
    assert max(sizes) < 4000


@pytest.mark.parametrize(
    ("field", "change"),
    [
        ("seed", {"seed": 6}),
        ("global_batch", {"global_batch_size": 12}),
        ("fingerprint", {"fingerprint": "abd"}),
        ("block_samples", {"block_samples": 48}),
        ("buckets", {"layout": None}),
        ("buckets.cell", {"layout": bucketed(100, cell=2).layout}),
        ("buckets", {"layout": bucketed(100, is_synchronous=True).layout}),
    ],
)
def test_state_of_another_order_is_refused_by_name(field, change):
    here = replace(bucketed(100, fingerprint="abc"), segments=())
    with pytest.raises(ConfigError, match=rf"^data\.{field}: .*Restore "):
        here.resume(replace(here, segments=(), **change).state(START))


def test_state_of_an_older_version_is_refused():
    with pytest.raises(ConfigError, match=r"^data.v: .* 1, .*Restore the version of sdtrain"):
        plan(100).resume({"v": 1, "step": 3})


def test_entering_a_hundred_million_samples_anywhere():
    num, per_shard = 100_000_000, 10_000
    here = Plan([Order("x", np.arange(0, num + 1, per_shard))], 0, 2048)
    per_block = here.pool_samples // 2048
    step = 50_000_000 // 2048
    tracemalloc.start()
    started = time.process_time()
    cursor = {**START, "step": step, "block": step // per_block, "step_in_block": step % per_block}
    taken, _ = next(here.walk(cursor))
    assert time.process_time() - started < 2
    assert tracemalloc.get_traced_memory()[1] < 64 << 20
    tracemalloc.stop()
    assert taken.shape == (2048, 2)
    assert set(taken[:, 1].tolist()) == {0}
    assert len(set((taken[:, 0] // per_shard).tolist())) > 20  # out of many shards, but not of all
    assert here.epochs(cursor) == {"epoch/x": 0.5}


def test_epochs_of_sources():
    here = plan(40, 60, weights=(Fraction(1), Fraction(3)), block_samples=32)
    for number, (_, cursor) in enumerate(steps(here, 40), start=1):
        epochs = here.epochs(cursor)
        assert epochs["epoch/a"] == pytest.approx(number * 8 / 4 / 40, abs=1e-3)
        assert epochs["epoch/b"] == pytest.approx(number * 8 * 3 / 4 / 60, abs=1e-3)
    assert Plan([Order("", np.array([0, 8]))], 0, 4).epochs(START) == {"epoch": 0.0}
