"""Parts of remote shards on a node's disk: bounded, shared, and whole or not there."""

import os
import signal
import subprocess
import sys
import threading
import time

import pytest

from sdtrain.data import cache as module
from sdtrain.data.cache import Cache


def fill(cache, number, num_bytes=1000, address="http://a/x.tar"):
    path = cache.path(address, "v", number)
    cache.fill(path, num_bytes, lambda: bytes([number % 256]) * num_bytes)
    return path


def test_a_part_is_kept(tmp_path):
    cache = Cache(tmp_path / "c", 20_000)
    path = cache.path("http://a/x.tar", "v1", 3)
    assert cache.read(path, 5, 1, 4) is None
    assert cache.fill(path, 5, lambda: b"abcde") == b"abcde"
    assert cache.read(path, 5, 1, 4) == b"bcd"
    assert cache.fill(path, 5, lambda: pytest.fail("it is there")) is None
    assert {file.name for file in (tmp_path / "c").iterdir()} == {path.name, "total"}
    cache.drop(path)
    assert cache.read(path, 5, 1, 4) is None


def test_parts_are_told_apart_by_whole_address_version_and_number(tmp_path):
    cache = Cache(tmp_path, 20_000)
    first = ("http://a/laion/00000.tar", "v1", 0)
    others = [
        ("http://a/coyo/00000.tar", "v1", 0),
        (first[0], "v2", 0),
        (first[0], "v1", 1),
        (first[0] + "?x", "v1", 0),
    ]
    assert len({cache.path(*which) for which in (first, *others)}) == 5


def test_part_of_another_length_is_not_read(tmp_path):
    cache = Cache(tmp_path, 20_000)
    path = fill(cache, 1)
    path.write_bytes(path.read_bytes()[:500])
    assert cache.read(path, 1000, 0, 10) is None


def test_it_is_bounded_and_drops_what_was_not_used_for_longest(tmp_path):
    cache = Cache(tmp_path, 20_000)
    kept = fill(cache, 0)
    for number in range(1, 60):
        fill(cache, number)
        os.utime(cache.path("http://a/x.tar", "v", number), (number, number))
        os.utime(kept, (0, 0))
        assert cache.read(kept, 1000, 0, 1)
        assert sum(file.stat().st_size for file in tmp_path.iterdir()) <= 20_000 + 20
    assert cache.read(kept, 1000, 0, 1)
    left = sorted(int(file.suffix[1:]) for file in tmp_path.iterdir() if file.suffix)
    assert 16 <= len(left) <= 20
    assert left[1:] == list(range(60 - len(left) + 1, 60))


def test_what_others_left_is_counted(tmp_path):
    for number in range(18):
        fill(Cache(tmp_path, 20_000), number)
    fill(Cache(tmp_path, 10_000), 18)
    assert sum(file.stat().st_size for file in tmp_path.iterdir()) <= 10_020


def test_part_larger_than_a_tenth_is_not_kept(tmp_path):
    cache = Cache(tmp_path, 20_000)
    assert cache.fill(cache.path("a", "v", 0), 3000, lambda: b"x" * 3000) == b"x" * 3000
    assert not any(file.suffix for file in tmp_path.iterdir())


def test_one_downloads_and_the_others_wait(tmp_path):
    cache, started, num_downloads = Cache(tmp_path, 20_000), threading.Barrier(8), []
    path = cache.path("a", "v", 0)

    def download():
        num_downloads.append(1)
        time.sleep(0.1)
        return b"x" * 100

    def work(found):
        started.wait()
        found.append(cache.fill(path, 100, download))

    found = []
    threads = [threading.Thread(target=work, args=(found,)) for _ in range(8)]
    [thread.start() for thread in threads]
    [thread.join() for thread in threads]
    assert len(num_downloads) == 1
    assert sorted(found, key=bool) == [None] * 7 + [b"x" * 100]
    assert {file.name for file in tmp_path.iterdir()} == {path.name, "total"}


def test_download_that_fails_leaves_nothing(tmp_path):
    cache = Cache(tmp_path, 20_000)
    path = cache.path("a", "v", 0)

    def download():
        raise ValueError

    with pytest.raises(ValueError):
        cache.fill(path, 100, download)
    assert list(tmp_path.iterdir()) == []
    assert cache.fill(path, 3, lambda: b"abc") == b"abc"


def test_who_waited_for_a_download_that_failed_keeps_its_own(tmp_path):
    cache, is_waiting = Cache(tmp_path, 20_000), threading.Event()
    path = cache.path("a", "v", 0)
    waiter = threading.Thread(target=lambda: (is_waiting.set(), cache.fill(path, 3, lambda: b"abc")))

    def download():
        waiter.start()
        is_waiting.wait()
        time.sleep(0.2)
        raise ValueError

    with pytest.raises(ValueError):
        cache.fill(path, 3, download)
    waiter.join()
    assert cache.read(path, 3, 0, 3) == b"abc"


def test_disk_that_is_full_makes_no_error(tmp_path, monkeypatch):
    cache = Cache(tmp_path, 20_000)

    def write(*arguments):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(module, "_write", write)
    path = cache.path("a", "v", 0)
    assert cache.fill(path, 3, lambda: b"abc") == b"abc"
    assert cache.read(path, 3, 0, 3) is None
    assert not list(tmp_path.glob("*.draft"))


KILLED = """
import sys, time
from sdtrain.data.cache import Cache
cache = Cache(sys.argv[1], 20_000)
def download():
    print("downloading", flush=True)
    time.sleep(60)
cache.fill(cache.path("a", "v", 0), 1000, download)
"""


def test_killed_in_the_middle_of_a_download(tmp_path):
    child = subprocess.Popen([sys.executable, "-c", KILLED, tmp_path], stdout=subprocess.PIPE, text=True)
    try:
        assert child.stdout.readline() == "downloading\n"
        path = Cache(tmp_path, 20_000).path("a", "v", 0)
        draft = path.with_name(f"{path.name}.draft")
        assert draft.exists()
        draft.write_bytes(bytes(3000))  # what it had written, of another length
    finally:
        os.kill(child.pid, signal.SIGKILL)
        child.wait()
        child.stdout.close()
    cache = Cache(tmp_path, 20_000)
    assert cache.read(path, 1000, 0, 5) is None
    assert cache.fill(path, 1000, lambda: b"x" * 1000) == b"x" * 1000
    assert cache.read(path, 1000, 0, 1000) == b"x" * 1000
    assert not draft.exists()


RACE = """
import random, sys
from sdtrain.data.cache import Cache
cache, chance = Cache(sys.argv[1], 20_000), random.Random(int(sys.argv[2]))
for _ in range(400):
    number = chance.randrange(40)
    path = cache.path("a", "v", number)
    for _ in range(5):
        data = cache.read(path, 1000, 0, 1000) or cache.fill(path, 1000, lambda: bytes([number]) * 1000)
        if data is not None:
            break
    assert data is None or data == bytes([number]) * 1000
"""


def test_processes_that_fill_and_evict_at_once(tmp_path):
    children = [
        subprocess.Popen([sys.executable, "-c", RACE, tmp_path, str(seed)], stderr=subprocess.PIPE, text=True)
        for seed in range(3)
    ]
    try:
        for child in children:
            _, said = child.communicate(timeout=60)
            assert child.returncode == 0, said
    finally:
        [child.kill() for child in children if child.poll() is None]
    assert sum(file.stat().st_size for file in tmp_path.iterdir()) <= 20_020
    assert not list(tmp_path.glob("*.draft"))
