"""Shards indexed by many processes: the same result, nothing done twice, and a death that stays where it was."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from sdtrain.data.index import build_index
from sdtrain.data.indexing import index_all
from sdtrain.data.shard_index import index_path

TOOL = Path(__file__).parents[2] / "tools" / "index_shards.py"


@pytest.fixture
def shards(make_shards, make_sample):
    bad = {3: {"png": b"<html>"}, 7: {"png": make_sample(7)["png"][:-40]}}
    return [str(s) for s in make_shards([make_sample(n, **bad.get(n, {})) for n in range(12)], per_shard=6)]


def test_the_same_as_one_after_the_other(shards, tmp_path):
    alone = build_index(shards)
    for shard in shards:
        index_path(shard).unlink()
    told = []
    missing = str(tmp_path / "missing.tar")
    failures = index_all([*shards, missing], None, 3, on_done=lambda *done: told.append(done))
    assert list(failures) == [missing]
    assert "No such file" in failures[missing]
    assert failures[missing].count(missing) == 1
    assert sorted(address for address, _ in told) == sorted([*shards, missing])
    assert all(index_path(shard).is_file() for shard in shards)
    assert build_index(shards).fingerprint == alone.fingerprint
    assert index_all(shards, None, 2, is_deep=True) == {}
    assert [int(key) for key in build_index(shards).key] == [n for n in range(12) if n not in (3, 7)]
    assert {(loss.reason, loss.count) for loss in build_index(shards).losses} == {
        ("not_an_image", 1),
        ("decode_error", 1),
    }


@pytest.mark.slow
def test_killed_and_started_again(make_shards, make_sample):
    """Finished shards are kept: they are not walked again."""
    shards = make_shards([make_sample(n % 50, __key__=f"{n}") for n in range(1200)], per_shard=100)
    arguments = [sys.executable, str(TOOL), str(shards[0].parent), "--workers", "1"]
    tool = subprocess.Popen(arguments, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    try:
        deadline = time.monotonic() + 300  # of a machine that many share
        while not index_path(shards[1]).exists() and tool.poll() is None and time.monotonic() < deadline:
            time.sleep(0.002)
    finally:
        tool.send_signal(signal.SIGKILL)
        tool.wait()
    time.sleep(0.3)  # what it started ends with it
    kept = {shard: os.stat(index_path(shard)).st_mtime_ns for shard in shards if index_path(shard).exists()}
    assert 2 <= len(kept) < 12
    done = subprocess.run(arguments, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("1200 samples in 12 shards, fingerprint ")
    assert all(os.stat(index_path(shard)).st_mtime_ns == mtime for shard, mtime in kept.items())
