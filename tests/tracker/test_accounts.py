"""Goodput and restarts from rows as a run writes them, and the card of its data."""

import re

from sdtrain.tracker.accounts import TimeSpent, data_card, looking_card, time_card


def train(step, time, seconds=None):
    return {"stage": "diffusion", "step": step, "loss": 1.0, "step_seconds": 1.0, "seconds": seconds, "time": time}


def test_what_a_restart_took_back_is_not_goodput():
    rows = [train(10, 100.0, 10.0), train(20, 110.0), train(30, 120.0)]
    rows += [{"stage": "diffusion", "step": 30, "event": "checkpoint", "stall_seconds": 2.0, "time": 121.0}]
    rows += [train(20, 200.0), train(30, 210.0), train(40, 220.0)]
    rows += [{"stage": "diffusion", "step": 40, "val/loss": 1.0, "evaluation_seconds": 3.0, "time": 223.0}]
    spent = TimeSpent.of(rows)
    assert (spent.wall, spent.training, spent.repeated) == (133.0, 40.0, 20.0)
    assert (spent.evaluation, spent.saving, spent.num_restarts) == (3.0, 2.0, 1)
    card = time_card(rows)
    assert "restarts: 1" in card
    assert "30.1 %" in card  # 40 of 133 seconds


def test_a_stop_and_its_resume_are_a_restart_that_lost_nothing():
    stop = {"stage": "diffusion", "step": 10, "event": "stop", "reason": "SIGTERM", "time": 11.0}
    spent = TimeSpent.of([train(10, 10.0, 10.0), stop, train(20, 40.0)])
    assert (spent.num_restarts, spent.repeated, spent.training) == (1, 0.0, 20.0)
    assert TimeSpent.of([train(10, 10.0), stop]).num_restarts == 0  # it ended so


def test_stages_after_each_other_are_no_restart():
    rows = [train(10, 10.0), train(20, 20.0), train(5, 30.0) | {"stage": "autoencoder"}]
    assert TimeSpent.of(rows).num_restarts == 0


def test_rows_that_say_nothing_of_time_give_no_card():
    assert time_card([]) == ""
    assert time_card([{"stage": "a", "step": 1, "loss": 1.0}]) == ""


def test_losses_are_shown_as_a_share_of_what_was_read():
    counts = {"read": 200, "read_bytes": 2**30, "replaced": 5, "replaced/undecodable": 5, "replaced_in/a/<0>.tar": 4}
    card = data_card("Data", counts | {"lost/truncated": 1})
    assert card.count("2.5 %") == 2
    assert "0.5 %" in card
    for told in ("1.00 GiB", ">read bytes<", "replaced: undecodable", "replaced in a/&lt;0&gt;.tar"):
        assert told in card
    assert data_card("Data", {}) == ""


def test_looking_is_told_by_kind_and_as_a_share_of_the_stage():
    card = looking_card("Looking", {"seconds": {"samples": 0.5, "validation": 3.0}, "share": 0.029})
    cells = re.findall("<t[hd][^>]*>([^<]+)", card)
    assert cells == ["samples", "0.5 s", "validation", "3 s", "together", "3.5 s", "2.9 %"]
    assert looking_card("Looking", {}) == ""
    assert looking_card("Looking", {"seconds": {"samples": "long"}, "share": None}) == ""


def test_what_comes_after_the_run_is_no_time_of_it():
    rows = [{"event": "code", "time": 0.0}, train(10, 10.0)]
    later = [{"event": "evaluation", "stage": "evaluation", "step": 10, "time": 1e6}, {"event": "code", "time": 2e6}]
    assert TimeSpent.of(rows + later).wall == TimeSpent.of(rows).wall == 10.0
    assert TimeSpent.of(later).wall == 0.0
