"""The stream: one sequence for any number of ranks and workers, from any place, and workers that behave."""

import io
import itertools
import json
import os
import pickle
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from sdtrain.data.bucket import Buckets
from sdtrain.data.index import build_index
from sdtrain.data.order import Order
from sdtrain.data.plan import START, Layout, Plan
from sdtrain.data.reader import Reader
from sdtrain.data.stream import Loader, Stream, _packed, _unpacked
from sdtrain.errors import ConfigError

BATCH = 8


@pytest.fixture
def index(make_shards, make_sample):
    odd = {5: {"png": b"no image"}, 6: {"txt": b"\xff\xff"}}
    return build_index(make_shards([make_sample(number, **odd.get(number, {})) for number in range(21)], per_shard=6))


@pytest.fixture
def wide_index(make_shards, make_sample):
    """Pictures of three shapes, of which random crops differ."""

    def picture(number):
        pixels = np.random.default_rng(number).integers(0, 256, (*[(40, 40), (48, 32), (32, 50)][number % 7 % 3], 3))
        buffer = io.BytesIO()
        Image.fromarray(pixels.astype(np.uint8)).save(buffer, "PNG")
        return buffer.getvalue()

    samples = [make_sample(number, png=picture(number)) for number in range(50)]
    return build_index(make_shards(samples, per_shard=13, name="wide"))


def plan_of(index, size=BATCH, **options):
    starts = np.searchsorted(index.shard, np.arange(len(index.shards) + 1))
    return Plan([Order("", starts)], 11, size, fingerprint="f", **options)


def bucketed(index, is_synchronous=False):
    layout = Layout(Buckets(step=8).table(32), index, 8 if is_synchronous else 1, is_synchronous)
    return plan_of(index, size=16 if is_synchronous else BATCH, layout=layout, block_samples=24)


def read(
    index,
    num_steps,
    rank=0,
    world=1,
    num_workers=0,
    num_accumulate=1,
    cursor=START,
    plan=None,
    image_size=16,
    **options,
):
    """What a rank is given over some steps: what tells a sample's place and pixels, and the cursors."""
    reader = Reader(index, image_size, num_workers=num_workers, max_bad_fraction=1, **options)
    reader.connect(11)
    plan = plan or plan_of(index)
    stream = Stream(reader, plan, cursor, rank, world, num_accumulate)
    batches = list(itertools.islice(Loader(stream, num_workers), num_steps * num_accumulate))
    steps = [batches[first : first + num_accumulate] for first in range(0, len(batches), num_accumulate)]
    for (_, after), micro in zip(plan.walk(cursor), steps):
        assert [batch["last_micro_of_step"] for batch in micro] == [False] * (num_accumulate - 1) + [True]
        assert all(batch["cursor"] == after for batch in micro)
    return [[row for batch in micro for row in rows(batch)] for micro in steps]


def rows(batch):
    images = [(tuple(image.shape), hash(image.numpy().tobytes())) for image in batch["image"]]
    told = [batch[name].tolist() for name in ("place", "sample_id", "epoch")]
    return list(zip(batch["key"], batch["caption"], *told, images))


def after(plan, num_steps):
    """The cursor after so many steps, by way of a checkpoint's JSON."""
    cursor = START if num_steps == 0 else next(itertools.islice(plan.walk(), num_steps - 1, None))[1]
    return plan.resume(json.loads(json.dumps(plan.state(cursor))))[1]


@pytest.mark.parametrize("num_workers", [0, 1, 2, 3])
@pytest.mark.parametrize("world", [1, 2, 4, 8])
def test_global_batches_do_not_depend_on_ranks_and_workers(index, world, num_workers):
    ranks = [range(world), [world - 1]][num_workers > 1]  # starting workers takes a while
    whole, size = read(index, 6), BATCH // world
    for rank in ranks:
        part = slice(rank * size, (rank + 1) * size)
        assert read(index, 6, rank, world, num_workers) == [step[part] for step in whole]


@pytest.mark.parametrize("num_workers", [0, 1, 3])
@pytest.mark.parametrize(("world", "num_accumulate"), [(1, 8), (2, 4), (4, 2), (8, 1)])
def test_nor_do_buckets_and_random_crops(wide_index, world, num_accumulate, num_workers):
    how = {"plan": bucketed(wide_index), "image_size": 32, "crop": "random", "flip": True}
    whole, size = read(wide_index, 6, num_accumulate=8, **how), BATCH // world
    for rank in range(world) if num_workers == 0 else [world - 1]:
        mine = read(wide_index, 6, rank, world, num_workers, num_accumulate, **how)
        assert mine == [step[rank * size : (rank + 1) * size] for step in whole]
    assert len({shape for step in whole for *_, (shape, _) in step}) == 3


@pytest.mark.parametrize(("world", "num_accumulate"), [(2, 2), (4, 4), (8, 2)])
def test_nor_do_synchronous_groups(wide_index, world, num_accumulate):
    how = {"plan": bucketed(wide_index, is_synchronous=True), "image_size": 32, "crop": "random"}
    whole = read(wide_index, 5, num_accumulate=2, **how)
    ranks = [read(wide_index, 5, rank, world, 0, num_accumulate, **how) for rank in range(world)]
    half = 8 // world  # of a rank's part of a step, one of two groups
    for step, *parts in zip(whole, *ranks):
        groups = [sum((part[g * half : (g + 1) * half] for part in parts), []) for g in range(2)]
        assert groups == [step[:8], step[8:]]
        assert all(len({shape for *_, (shape, _) in group}) == 1 for group in groups)


@pytest.mark.parametrize("made", [plan_of, bucketed, lambda index: bucketed(index, is_synchronous=True)])
def test_places_count_the_samples_of_the_run(wide_index, made):
    plan = made(wide_index)
    size, num_accumulate = plan.global_batch_size, 8 if plan.layout else 1
    steps = read(wide_index, 5, plan=plan, image_size=32, num_accumulate=num_accumulate)
    assert [sorted(place for _, _, place, *_ in step) for step in steps] == [
        list(range(number * size, (number + 1) * size)) for number in range(5)
    ]


def test_a_sample_is_cropped_otherwise_in_another_epoch(wide_index):
    seen = {}
    for step in read(wide_index, 16, image_size=32, crop="random"):
        for *_, sample, epoch, (_, pixels) in step:
            seen.setdefault(sample, {})[epoch] = pixels
    twice = [epochs for epochs in seen.values() if len(epochs) > 1]
    assert len([epochs for epochs in twice if len(set(epochs.values())) > 1]) > len(twice) / 4


@pytest.mark.parametrize("num_workers", [0, 2])
def test_micro_batches_join_to_the_same_step(index, num_workers):
    assert read(index, 5, num_accumulate=4, num_workers=num_workers) == read(index, 5)


@pytest.mark.parametrize("stop", range(10))
def test_from_any_place_on_with_other_ranks_and_workers_twice(wide_index, stop):
    """Blocks of three steps: these are all places in a block, the first and the last among them."""
    plan = bucketed(wide_index)
    how = {"plan": plan, "image_size": 32, "crop": "random", "flip": True}
    whole = read(wide_index, stop + 5, num_accumulate=8, **how)
    ranks = [read(wide_index, 2, rank, 2, 0, 4, cursor=after(plan, stop), **how) for rank in range(2)]
    assert [sum(parts, []) for parts in zip(*ranks)] == whole[stop : stop + 2]
    ranks = [read(wide_index, 3, rank, 4, int(rank == 3), 2, cursor=after(plan, stop + 2), **how) for rank in range(4)]
    assert [sum(parts, []) for parts in zip(*ranks)] == whole[stop + 2 :]


def test_from_a_place_on_with_a_cache(index):
    whole, cursor = read(index, 8), after(plan_of(index), 4)
    halves = [read(index, 4, rank, 2, num_accumulate=2, cursor=cursor, num_cached=9) for rank in range(2)]
    assert [first + second for first, second in zip(*halves)] == whole[4:]


def test_batch_that_does_not_divide_is_refused_before_any_worker_starts(index):
    with pytest.raises(ConfigError, match="do not divide"):
        Stream(Reader(index, 16), plan_of(index), world=3)


def test_workers_count_what_they_replace(index):
    reader = Reader(index, 16, max_bad_fraction=1, num_workers=2)
    loader = Loader(Stream(reader, plan_of(index, 21)), 2)
    batches = list(itertools.islice(loader, 4))
    counts = reader.accounting()
    assert counts["read"] >= sum(len(batch["key"]) for batch in batches)  # they read ahead
    assert counts["replaced/not_an_image"] == counts["replaced/caption_not_utf8"] == counts["read"] // 21


def test_error_of_a_worker_reads_as_if_it_were_here_and_ends_it(make_shards, make_sample):
    index = build_index(make_shards([make_sample(number, png=b"no") for number in range(5)]))
    loader = Loader(Stream(Reader(index, 16, num_workers=1), plan_of(index, 2)), 1)
    with pytest.raises(ConfigError, match=r"^data: "):
        next(iter(loader))
    (worker,) = loader._iterator._workers
    del loader
    assert not worker.is_alive()


@pytest.mark.slow
@pytest.mark.parametrize("start_method", ["fork", "forkserver", "spawn"])
def test_workers_started_in_any_way(wide_index, start_method):
    plan = bucketed(wide_index)
    reader = Reader(wide_index, 32, num_cached=21, max_bad_fraction=1, num_workers=2)
    batches = itertools.islice(Loader(Stream(reader, plan, START, 1, 2, 4), 2, start_method), 8)
    found = [row for batch in batches for row in rows(batch)]
    assert found == sum(read(wide_index, 2, 1, 2, 0, 4, plan=plan, image_size=32), [])


SIGNALS = """
import os, signal, sys
from pathlib import Path
import numpy as np
from sdtrain.data.index import build_index
from sdtrain.data.order import Order
from sdtrain.data.plan import Plan
from sdtrain.data.reader import Reader
from sdtrain.data.stream import Loader, Stream

def children_of(process):
    for task in Path(f"/proc/{process}/task").iterdir():
        for child in (task / "children").read_text().split():
            yield from (child, *children_of(child))

if __name__ == "__main__":
    index = build_index([Path(sys.argv[1])])
    plan = Plan([Order("", np.array([0, len(index)]))], 0, 4)
    iterator = iter(Loader(Stream(Reader(index, 16, num_workers=2), plan), 2, sys.argv[2]))
    for _ in range(3):
        next(iterator)
    children = list(children_of(os.getpid()))
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
@pytest.mark.parametrize(
    "start_method",
    ["fork", pytest.param("forkserver", marks=pytest.mark.slow), pytest.param("spawn", marks=pytest.mark.slow)],
)
def test_workers_survive_stop_signals_and_end_with_the_parent(make_shards, tmp_path, start_method):
    script = tmp_path / "script.py"
    script.write_text(SIGNALS)
    command = [sys.executable, script, make_shards(21)[0], start_method]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, env=environment)
    assert done.stdout.startswith("alive"), done.stderr
    assert done.returncode == 0
    deadline = time.monotonic() + 20  # a fork server ends when it sees that nobody is there
    while any(is_running(child) for child in done.stdout.split()[1:]):
        assert time.monotonic() < deadline
        time.sleep(0.05)


def is_running(process):
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


HANGS = """
import multiprocessing, sys, time
from types import SimpleNamespace
from sdtrain.data.stream import Loader, Stream

class Hanging(Stream):
    def __init__(self): ...
    def __iter__(self):
        yield {}
        time.sleep(600)

if __name__ == "__main__":
    loader = Loader(Hanging(), 1, sys.argv[1])
    loader.prefetch_factor = 1
    next(iter(loader))
"""


@pytest.mark.slow
@pytest.mark.parametrize("start_method", ["fork", "forkserver", "spawn"])
def test_a_worker_that_hangs_is_ended_by_the_parent(tmp_path, start_method):
    """The signal comes from the process that asked for the worker, which under a fork server is not its parent."""
    script = tmp_path / "script.py"
    script.write_text(HANGS)
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run([sys.executable, script, start_method], timeout=300, env=environment)
    assert done.returncode == 0


def test_image_is_float_in_range(index):
    batch = next(iter(Stream(Reader(index, 16), plan_of(index))))
    assert batch["image"].dtype == torch.float32
    assert -1 <= batch["image"].min() <= batch["image"].max() <= 1


def test_small_tensors_travel_in_the_message():
    """Each that does not costs the main process a connection to the worker."""
    batch = {"image": torch.rand(8, 3, 32, 32), "sample_id": torch.arange(8), "place": torch.zeros(0), "caption": ["a"]}
    packed = _packed(batch)
    assert [name for name, value in packed.items() if torch.is_tensor(value)] == ["image"]
    found = _unpacked(pickle.loads(pickle.dumps(packed)))
    assert found.keys() == batch.keys()
    assert found["caption"] == ["a"]
    for name in ("image", "sample_id", "place"):
        assert torch.equal(found[name], batch[name])
        assert found[name].dtype == batch[name].dtype
        found[name].zero_()  # ours to write
