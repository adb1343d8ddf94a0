"""Decoding in a child: what it says, and that a child that dies or hangs costs one picture."""

import os
import time

import pytest

from sdtrain.data.deep_check import DeepCheck


@pytest.fixture
def pictures(make_sample):
    return [make_sample(number)["png"] for number in range(3)]


def alive(pid):
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


def test_reasons(pictures):
    with DeepCheck() as check:
        said = [check(data) for data in (pictures[0], b"<html>", pictures[1][:-40], b"", pictures[2])]
        child = check._child.pid
    assert said == ["", "not_an_image", "decode_error", "not_an_image", ""]
    assert not alive(child)


@pytest.mark.parametrize("how", ["dies", "hangs", "raises"])
def test_a_picture_that_kills(pictures, monkeypatch, how):
    def decode(data, *_):
        if data == pictures[1]:
            {"dies": lambda: os._exit(9), "hangs": lambda: time.sleep(60), "raises": lambda: 1 / 0}[how]()

    monkeypatch.setattr("sdtrain.data.deep_check.decode_image", decode)  # the child is forked, so it is there too
    with DeepCheck(timeout_seconds=1) as check:
        assert check(pictures[0]) == ""
        first = check._child.pid
        assert check(pictures[1]) == ("decoder_hung" if how == "hangs" else "decoder_died")
        assert not alive(first)
        assert check(pictures[2]) == ""


def test_the_child_ends_with_a_parent_that_was_killed(pictures):
    with DeepCheck() as check:
        check(pictures[0])
        check._pipe.close()  # as the system does for the dead
        check._child.join(5)
        assert check._child.exitcode == 0
