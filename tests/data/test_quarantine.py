"""The record of bad samples."""

import json
import logging

from sdtrain.data import quarantine
from sdtrain.data.bad_sample import BadSample
from sdtrain.data.quarantine import Quarantine


def bad():
    error = BadSample("decode_error", "the caption says: secret")
    error.__cause__ = OSError("secret")
    return error


def test_a_line_each_without_captions(tmp_path):
    record = Quarantine(tmp_path / "quarantine", rank=2)
    record.add(bad(), "s/x.tar", "a\nb", 512)
    record.enter("worker1")
    record.add(BadSample("too_small"), "s/x.tar", "c", 1024)
    first = json.loads((tmp_path / "quarantine/rank2-main.jsonl").read_text())
    assert first == {
        "reason": "decode_error",
        "shard": "s/x.tar",
        "key": "a\nb",
        "offset": 512,
        "exception": "OSError",
    }
    assert json.loads((tmp_path / "quarantine/rank2-worker1.jsonl").read_text())["exception"] == "BadSample"


def test_said_five_times_and_then_now_and_then(caplog):
    record = Quarantine()
    for number in range(2001):
        record.add(bad(), "s", str(number), 0)
    record.add(BadSample("too_small"), "s", "other", 0)
    said = [message.split()[2] for message in caplog.messages]
    assert said == ["0", "1", "2", "3", "4", "999", "1999", "other"]
    assert {entry.levelno for entry in caplog.records} == {logging.WARNING}


def test_file_has_a_limit(tmp_path, monkeypatch):
    monkeypatch.setattr(quarantine, "_MAX_FILE_BYTES", 500)
    record = Quarantine(tmp_path)
    for _ in range(100):
        record.add(bad(), "s", "k", 0)
    assert record.path.stat().st_size < 700


def test_disk_that_does_not_take_it_stops_nothing(tmp_path, caplog):
    (tmp_path / "file").write_text("")
    record = Quarantine(tmp_path / "file")
    record.add(bad(), "s", "k", 0)
    assert record.path is None
    assert "cannot be written" in caplog.text
    record.add(bad(), "s", "k", 0)
