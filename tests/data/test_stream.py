"""The stream: one sequence for any number of ranks and workers, from any step, and workers that behave."""

import itertools
import os
import signal
import subprocess
import sys

import pytest
import torch

from sdtrain.data.index import build_index
from sdtrain.data.plan import Plan
from sdtrain.data.reader import Reader
from sdtrain.data.stream import Loader, Stream
from sdtrain.errors import ConfigError

BATCH = 8


@pytest.fixture
def index(make_shards, make_sample):
    odd = {5: {"png": b"no image"}, 6: {"txt": b"\xff\xff"}}
    return build_index(make_shards([make_sample(number, **odd.get(number, {})) for number in range(21)], per_shard=6))


def read(index, num_steps, rank=0, world=1, num_workers=0, num_accumulate=1, step=0, num_cached=0):
    """What a rank is given over some steps: (key, sample id, epoch, first pixel) a sample, and the cursors."""
    reader = Reader(index, 16, num_cached, max_bad_fraction=1, num_workers=num_workers)
    stream = Stream(reader, Plan(len(index), 11, BATCH, "f"), step, rank, world, num_accumulate)
    batches = list(itertools.islice(Loader(stream, num_workers), num_steps * num_accumulate))
    steps = [batches[first : first + num_accumulate] for first in range(0, len(batches), num_accumulate)]
    for number, micro in enumerate(steps, start=step + 1):
        assert [batch["last_micro_of_step"] for batch in micro] == [False] * (num_accumulate - 1) + [True]
        assert all(batch["cursor"] == stream.plan.state(number) for batch in micro)
    return [[row for batch in micro for row in rows(batch)] for micro in steps]


def rows(batch):
    pixels = batch["image"][:, 0, 0, 0].tolist()
    return list(zip(batch["key"], batch["caption"], batch["sample_id"].tolist(), batch["epoch"].tolist(), pixels))


@pytest.mark.parametrize("num_workers", [0, 1, 2])
@pytest.mark.parametrize("world", [1, 2, 4])
def test_global_batches_do_not_depend_on_ranks_and_workers(index, world, num_workers):
    ranks = [read(index, 6, rank, world, num_workers) for rank in range(world)]
    assert [sum(step, []) for step in zip(*ranks)] == read(index, 6)


@pytest.mark.parametrize("num_workers", [0, 2])
def test_micro_batches_join_to_the_same_step(index, num_workers):
    assert read(index, 5, num_accumulate=4, num_workers=num_workers) == read(index, 5)


@pytest.mark.parametrize("step", [1, 2, 3, 7, 100])
def test_from_any_step_on(index, step):
    whole = read(index, step + 3)
    assert read(index, 3, step=step) == whole[step:]


def test_from_a_step_on_with_other_ranks_workers_and_cache(index):
    whole = read(index, 8)
    halves = [read(index, 4, rank, 2, num_accumulate=2, step=4, num_cached=9) for rank in range(2)]
    assert [first + second for first, second in zip(*halves)] == whole[4:]
    assert read(index, 4, step=4, num_workers=2, num_accumulate=2) == whole[4:]


def test_batch_that_does_not_divide_is_refused_before_any_worker_starts(index):
    with pytest.raises(ConfigError, match="do not divide"):
        Stream(Reader(index, 16), Plan(21, 0, BATCH), world=3)


def test_workers_count_what_they_replace(index):
    reader = Reader(index, 16, max_bad_fraction=1, num_workers=2)
    loader = Loader(Stream(reader, Plan(21, 0, 21)), 2)
    batches = list(itertools.islice(loader, 4))
    counts = reader.accounting()
    assert counts["read"] >= sum(len(batch["key"]) for batch in batches)  # they read ahead
    assert counts["replaced/not_an_image"] == counts["replaced/caption_not_utf8"] == counts["read"] // 21


def test_error_of_a_worker_reads_as_if_it_were_here(make_shards, make_sample):
    index = build_index(make_shards([make_sample(number, png=b"no") for number in range(5)]))
    loader = Loader(Stream(Reader(index, 16, num_workers=1), Plan(5, 0, 2)), 1)
    with pytest.raises(ConfigError, match=r"^data: none of 5 samples"):
        next(iter(loader))


@pytest.mark.slow
def test_workers_that_are_spawned(index):
    reader = Reader(index, 16, num_cached=21, max_bad_fraction=1, num_workers=1)
    loader = Loader(Stream(reader, Plan(21, 11, BATCH, "f")), 1)
    loader.multiprocessing_context = "spawn"
    assert [rows(batch) for batch in itertools.islice(loader, 2)] == read(index, 2)


SIGNALS = """
import os, signal, sys
from pathlib import Path
from sdtrain.data.index import build_index
from sdtrain.data.plan import Plan
from sdtrain.data.reader import Reader
from sdtrain.data.stream import Loader, Stream
if __name__ == "__main__":
    index = build_index([Path(sys.argv[1])])
    iterator = iter(Loader(Stream(Reader(index, 16, num_workers=2), Plan(len(index), 0, 4)), 2))
    for _ in range(3):
        next(iterator)
    children = Path(f"/proc/{os.getpid()}/task/{os.getpid()}/children").read_text().split()
    for child in children:
        for name in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2):
            # from a process that is not the parent, as the scheduler's signals are
            if os.fork() == 0:
                os.kill(int(child), name)
                os._exit(0)
            os.wait()
    for _ in range(20):
        next(iterator)
    print("alive", *children, flush=True)
"""


@pytest.mark.skipif(not hasattr(signal, "sigwaitinfo"), reason="the signals of a scheduler are a matter of Linux")
def test_workers_survive_stop_signals_and_end_with_the_parent(make_shards):
    shard = make_shards(21)[0]
    done = subprocess.run([sys.executable, "-c", SIGNALS, shard], capture_output=True, text=True, timeout=60)
    assert done.stdout.startswith("alive"), done.stderr
    assert done.returncode == 0
    for child in done.stdout.split()[1:]:
        assert not os.path.exists(f"/proc/{child}")


def test_image_is_float_in_range(index):
    batch = next(iter(Stream(Reader(index, 16), Plan(21, 0, BATCH))))
    assert batch["image"].dtype == torch.float32
    assert -1 <= batch["image"].min() <= batch["image"].max() <= 1
