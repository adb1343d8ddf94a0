"""img2dataset's output as it is: shards with a table of all downloads beside each."""

import builtins
import json

import numpy as np
import pyarrow as pa
import pytest
from pyarrow import parquet

from sdtrain.data.filter import apply
from sdtrain.data.img2dataset import read_table, table_address
from sdtrain.data.index import build_index
from sdtrain.errors import ConfigError

FAILED = {1, 4}


@pytest.fixture
def output(make_shards, make_sample):
    """Five downloads of which two failed: what the tool leaves."""

    def make(**changed):
        keys = [f"{number:09d}" for number in range(5)]
        told = {
            "url": [f"http://x/{n}.jpg" for n in range(5)],
            "key": keys,
            "status": ["failed_to_download" if n in FAILED else "success" for n in range(5)],
            "error_message": [None] * 5,
            "width": [None if n in FAILED else 256 for n in range(5)],
            "height": [None if n in FAILED else 256 for n in range(5)],
            "original_width": [None if n in FAILED else 1000 + n for n in range(5)],
            "similarity": pa.array([0.3, 0.31, 0.32, None, 0.34], pa.float32()),
            "punsafe": [0.1 * n for n in range(5)],
            "AESTHETIC_SCORE": [4.0 + n for n in range(5)],
            "LANGUAGE": ["en", "en", "de", None, "en"],
            "exif": ["{}"] * 5,
            **changed,
        }
        samples = []
        for number in sorted(set(range(5)) - FAILED):
            row = {"key": keys[number], "status": "success", "similarity": 0.9, "original_height": 700}
            data = make_sample(number, json=json.dumps(row).encode())
            samples.append({"jpg": data.pop("png"), **data, "__key__": keys[number]})
        shard = make_shards(samples, name="0")[0]
        parquet.write_table(pa.table({name: v for name, v in told.items() if v is not None}), table_address(str(shard)))
        return shard

    return make


def test_the_table_comes_with_the_shard(output):
    index = build_index([output()])
    assert [int(key) for key in index.key] == [0, 2, 3]
    assert index.losses == ()
    assert index.columns["original_width"].tolist() == [1000, 1002, 1003]
    assert index.columns["original_height"].tolist() == [700] * 3  # the .json alone has it
    np.testing.assert_allclose(index.columns["similarity"], [0.3, 0.32, np.nan], rtol=1e-6)
    assert index.columns["aesthetic"].tolist() == [4, 6, 7]
    assert index.columns["language"].tolist() == [b"en", b"de", b""]
    assert {"width", "height", "punsafe"} < index.columns.keys()
    assert not {"url", "exif", "key", "status", "error_message"} & index.columns.keys()
    assert [int(key) for key in apply(index, ["aesthetic > 5", "similarity > 0.1"])[0].key] == [2]


def test_downloads_that_the_shard_lost_are_told(output):
    index = build_index([output(status=["success"] * 4 + ["failed"])])
    assert {(loss.reason, loss.count) for loss in index.losses} == {("missing_sample", 1)}
    index = build_index([output(status=["success", "failed", "success", "failed", "failed"])])
    assert {(loss.reason, loss.count) for loss in index.losses} == {("not_in_table", 1)}
    assert np.isnan(index.columns["punsafe"]).tolist() == [False, False, True]


def test_another_table_beside_the_shard_is_told(output):
    index = build_index([output(status=None)])
    assert {loss.reason for loss in index.losses} == {"foreign_table"}
    path = output()
    (path.parent / "0-000000.parquet").write_bytes(b"PAR1" + bytes(99) + b"PAR1")
    assert {loss.reason for loss in build_index([path]).losses} == {"foreign_table"}


def test_a_table_that_changed_is_read_again(output):
    before = build_index([output()])
    after = build_index([output(punsafe=[0.5] * 5)])
    assert after.columns["punsafe"].tolist() == [0.5] * 3
    assert before.fingerprint == after.fingerprint  # the samples are the same


def test_without_pyarrow_it_says_what_to_install(output, monkeypatch):
    real = builtins.__import__

    def refuse(name, *arguments, **options):
        if name.startswith("pyarrow"):
            raise ImportError(name)
        return real(name, *arguments, **options)

    monkeypatch.setattr(builtins, "__import__", refuse)
    with pytest.raises(ConfigError, match=r"0-000000\.parquet .* pip install 'sdtrain\[parquet\]'"):
        build_index([output()])


def test_numbers_as_keys_and_odd_words():
    table = pa.table({"key": [3, 1], "status": ["success"] * 2, "language": ["x" * 99, "fr"], "n": [1, 2]})
    sink = pa.BufferOutputStream()
    parquet.write_table(table, sink)
    found = read_table(sink.getvalue().to_pybytes(), "t", [b"1", b"3", b"9"])
    np.testing.assert_array_equal(found.columns["n"], [2, 1, np.nan])
    assert found.columns["language"].tolist() == [b"fr", b"", b""]
    assert (found.num_missing, found.num_unknown) == (0, 1)
