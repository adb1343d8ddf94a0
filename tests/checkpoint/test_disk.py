"""What is told of a disk that takes nothing more, and of what is no matter of the disk."""

import errno
import os

import pytest
from safetensors import SafetensorError

from sdtrain.checkpoint.disk import free_bytes, told_of_disk
from sdtrain.errors import ConfigError


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM])
def test_the_first_line_names_the_path_and_the_bytes(tmp_path, number):
    """The guard: a directory that another user closed, or a snapshot, was a traceback in the middle of a run."""
    failure = OSError(number, os.strerror(number), str(tmp_path / "samples" / "a.png"))
    told = told_of_disk(failure, tmp_path)
    assert isinstance(told, ConfigError)
    assert str(told).startswith(f"cannot write {tmp_path}/samples/a.png: {os.strerror(number)} (")
    assert " bytes free); the checkpoints are intact: " in str(told)
    assert told.__cause__ is failure


def test_safetensors_has_the_number_in_its_words(tmp_path):
    failure = SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")
    assert str(told_of_disk(failure, tmp_path)).startswith(f"cannot write in {tmp_path}: No space left on device (")


def test_what_is_no_matter_of_the_disk_stays_as_it_is(tmp_path):
    elsewhere = PermissionError(errno.EACCES, "Permission denied", "/data/shard.tar")  # it may have been read
    for failure in (elsewhere, OSError(errno.EACCES, "no name"), SafetensorError("header too large"), ValueError()):
        assert told_of_disk(failure, tmp_path) is failure


def test_the_bytes_are_those_of_the_disk_that_is_full(tmp_path, monkeypatch):
    """The guard: a data set may lie on another disk than the run."""
    (tmp_path / "data").mkdir()
    asked = []
    monkeypatch.setattr("shutil.disk_usage", lambda path: asked.append(path) or Usage)
    told = told_of_disk(OSError(errno.ENOSPC, "full", str(tmp_path / "data" / "a.tar")), tmp_path / "run")
    assert "(7 bytes free)" in str(told)
    assert asked == [tmp_path / "data"]
    assert free_bytes(tmp_path / "not" / "yet") == 7


class Usage:
    free = 7
