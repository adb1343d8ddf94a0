"""The profile covers the steps it was asked for, and a stage too short for it still leaves one."""

import json

import pytest

from sdtrain.callback.profile import Profile


@pytest.mark.parametrize(("max_steps", "num_profiled"), [(8, 3), (3, 1)])
def test_the_asked_steps_are_profiled(tiny_fit, max_steps, num_profiled):
    directory = tiny_fit([Profile(first_step=2, num_steps=3)], max_steps=max_steps).context.directory
    events = json.loads((directory / "profile.json").read_text())["traceEvents"]
    assert sum(event["name"] == "aten::linear" for event in events) == num_profiled
    assert "aten::linear" in (directory / "profile.txt").read_text()


def test_a_stage_that_ends_before_it_leaves_none(tiny_fit):
    directory = tiny_fit([Profile(first_step=5)], max_steps=2).context.directory
    assert not (directory / "profile.txt").exists()
