"""What is said of bad samples that do not end a run: shards of which many are bad, runs of which a few are."""

import logging
import pickle

import numpy as np
import pytest

from sdtrain.data import accounting
from sdtrain.data.accounting import Accounting
from sdtrain.data.bad_sample import BadSample
from sdtrain.data.index import build_index
from sdtrain.data.reader import Reader
from sdtrain.data.shard_index import Shard

SHARDS = [Shard(f"/data/{name}.tar", 0, "") for name in ("a", "b")]


def tried(counts, shard, num_good, num_bad):
    for _ in range(num_good):
        counts.good(shard)
    for number in range(num_bad):
        counts.refuse(BadSample("decode_error"), shard, f"{number}", 0)


def test_a_shard_of_which_a_fifth_is_bad_is_named_once(caplog):
    counts = Accounting(SHARDS, 10_000, num_workers=2, max_bad_fraction=1)
    tried(counts, 0, 100, 20)  # 17 %
    assert "could not be used; repair it" not in caplog.text
    assert "bad_shards" not in counts.report()
    with caplog.at_level(logging.WARNING):
        tried(counts, 1, 50, 20)  # 29 %
        tried(counts, 1, 50, 20)
    said = [record.getMessage() for record in caplog.records if "repair it" in record.getMessage()]
    assert len(said) == 1
    assert "/data/b.tar" in said[0]
    assert counts.report()["bad_shards"] == 1
    tried(Accounting(SHARDS, 10_000, max_bad_fraction=1), 0, 1, 4)  # of so few nothing is said
    assert len([record for record in caplog.records if "repair it" in record.getMessage()]) == 1


def test_a_worker_names_it_for_all(caplog):
    counts = Accounting(SHARDS, 10_000, num_workers=2, max_bad_fraction=1)
    counts.enter_worker(1)
    tried(counts, 1, 10, 10)
    counts.enter_worker(0)
    tried(counts, 1, 10, 10)
    assert caplog.text.count("repair it") == 1
    counts = pickle.loads(pickle.dumps(counts))
    tried(counts, 0, 10, 10)
    assert counts.report()["bad_shards"] == 2


def test_one_in_a_thousand_is_said_every_hour(caplog, monkeypatch):
    now = [1e6]
    monkeypatch.setattr(accounting.time, "monotonic", lambda: now[0])
    monkeypatch.setattr(accounting, "_MANY_READS", 1000)
    counts = Accounting(SHARDS, 1 << 40, max_bad_fraction=1)
    tried(counts, 0, 900, 90)
    assert "samples could not be used: " not in caplog.text  # not many reads yet
    tried(counts, 0, 500, 50)
    assert caplog.text.count("samples could not be used: ") == 1
    now[0] += 3601
    tried(counts, 0, 10, 2)
    assert caplog.text.count("samples could not be used: ") == 2
    assert "most of them in /data/a.tar" in caplog.text
    caplog.clear()
    tried(Accounting(SHARDS, 1 << 40, max_bad_fraction=1), 0, 5000, 4)
    assert "samples could not be used: " not in caplog.text


@pytest.mark.parametrize("how", [503, "cut"])
def test_retries_are_counted(make_shards, server, tmp_path, how):
    from sdtrain.data.manifest import write_folder
    from sdtrain.data.retry import Retry
    from sdtrain.data.shard_index import index_shard
    from sdtrain.data.storage import Storage

    (shard,) = make_shards(6)
    server.etag = '"v1"'
    address = f"{server.url}/{shard.relative_to(tmp_path)}"
    (tmp_path / "index").mkdir()
    write_folder(tmp_path / "index", [address], lambda one: index_shard(one, tmp_path / "index"))
    reader = Reader(build_index([tmp_path / "index"]), 16, storage=Storage(retry=Retry(4, 0.001, 0.002)))
    server.behaviour = [how, how]
    reader.batch(np.arange(3), np.zeros(3))
    assert reader.accounting()["retries"] == 2
    reader.batch(np.arange(3), np.ones(3))
    assert reader.accounting()["retries"] == 2
