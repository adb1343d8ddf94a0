"""Shards as webdataset writes them: the same bytes each time, whole or not there."""

import time

import pytest

from sdtrain.data.shard_writer import write_shards


def test_same_bytes_each_time(tmp_path, make_sample):
    samples = [make_sample(number) for number in range(5)]
    first = write_shards(samples, tmp_path / "a" / "x-%06d.tar", 2)
    time.sleep(1.1)  # a clock in the header counts seconds
    second = write_shards(iter(samples), str(tmp_path / "b" / "x-%06d.tar"), 2)
    assert [path.name for path in first] == ["x-000000.tar", "x-000001.tar", "x-000002.tar"]
    assert [path.read_bytes() for path in first] == [path.read_bytes() for path in second]


def test_webdataset_reads_them(tmp_path, make_sample):
    shards = write_shards([make_sample(number) for number in range(5)], tmp_path / "x-%06d.tar", 3)
    import webdataset

    read = list(webdataset.WebDataset([str(shard) for shard in shards], shardshuffle=False))
    assert [sample["__key__"] for sample in read] == [f"{number:06d}" for number in range(5)]
    assert read[4]["png"] == make_sample(4)["png"]
    assert read[4]["txt"] == make_sample(4)["txt"]


def test_no_samples_no_shards(tmp_path):
    assert write_shards([], tmp_path / "x-%06d.tar") == []
    assert list(tmp_path.iterdir()) == []


def test_shards_appear_when_all_are_written(tmp_path, make_sample):
    def broken():
        yield from (make_sample(number) for number in range(5))
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_shards(broken(), tmp_path / "x-%06d.tar", 2)
    assert list(tmp_path.glob("*.tar")) == []
