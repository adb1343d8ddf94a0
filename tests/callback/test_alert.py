"""Loss spikes told once, and stalls of a real fit told while it stands."""

import threading
import time
from types import SimpleNamespace

import pytest
from lightning.pytorch import Callback

from sdtrain.callback import alert
from sdtrain.callback.alert import Alert, deviations
from sdtrain.callback.log import Log, off_the_clock
from sdtrain.callback.watchdog import Watchdog
from sdtrain.errors import ConfigError


@pytest.fixture
def look(tmp_path):
    """look(alert, losses) shows it a row a loss; the alerts that came of them."""
    rows = []
    context = SimpleNamespace(stage="diffusion", tracker=SimpleNamespace(log=rows.append), run_directory=tmp_path)
    log = Log(every_steps=1)

    def show(watching, losses, key="loss", is_first=True, waits=()):
        rows.clear()
        trainer = SimpleNamespace(callbacks=[log], is_global_zero=is_first, global_step=0, world_size=1)
        trainer.datamodule = SimpleNamespace(num_workers=3)
        for step, loss in enumerate(losses, start=1):
            log.last_row = {"stage": "diffusion", "step": step, "step_seconds": 0.1, "loss": 0.0, key: loss}
            log.last_row["data_wait_fraction"] = waits[step - 1] if waits else 0.0
            for _ in range(2):  # the second batch of this row tells nothing new
                watching.on_train_batch_end(trainer, SimpleNamespace(context=context), None, None, 0)
        return list(rows)

    return show


def begun(**options):
    watching = Alert(**options)
    watching._row = {"step": 0}
    return watching


NOISE = [1.0 + 0.02 * ((7 * i) % 11 - 5) / 5 for i in range(40)]


def test_a_spike_is_told_once_with_its_figures(look, capsys):
    (row,) = look(begun(), [*NOISE, 3.0, 3.1, *NOISE])
    assert (row["event"], row["stage"], row["step"], row["title"]) == (
        "alert",
        "diffusion",
        41,
        "diffusion: loss spike",
    )
    assert row["value"] == 3.0
    assert row["median"] == pytest.approx(1.0, abs=0.02)
    assert row["text"].startswith("loss is 3 at step 41,")
    assert row["text"].endswith("deviations above the median 1 of the 40 rows before")
    assert capsys.readouterr().err == f"alert: diffusion: {row['text']}\n"


def test_it_is_told_again_once_it_has_come_back(look):
    assert [row["step"] for row in look(begun(), [*NOISE, 3.0, *NOISE, 3.0])] == [41, 82]


def test_what_is_usual_is_no_spike(look):
    falling = [10.0 * 0.9**i for i in range(60)]
    assert look(begun(), falling) == []
    assert look(begun(), [1.0] * 40 + [1.03] * 10) == []  # a few per cent of a loss that does not move
    assert look(begun(), [*NOISE[:10], 9.0]) == []  # too few to tell
    assert len(look(begun(), [*NOISE, *[float("nan")] * 30, 3.0])) == 1  # those are the guard's
    assert look(begun(), [*NOISE, 3.0], is_first=False) == []
    assert len(look(begun(), [*NOISE, *[3.0] * 200])) == 1  # and then it is the usual one


def test_another_figure_may_be_watched_and_must_be_there(look):
    assert [row["value"] for row in look(begun(key="pixel"), [*NOISE, 2.0], key="pixel")] == [2.0]
    with pytest.raises(ConfigError, match="alert.key=pixel is not in the rows of diffusion: stage, step"):
        look(begun(key="pixel"), [1.0])


def test_waiting_for_data_is_told_once_with_what_to_do(look, capsys):
    (row,) = look(begun(), [1.0] * 60, waits=[0.9] * 60)
    assert (row["step"], row["title"], row["data_wait_fraction"]) == (20, "diffusion: waits for data", 0.9)
    assert row["text"].startswith("90% of the last rows' time until step 20 went by waiting for data")
    assert "raise data.num_workers, which is 3 " in row["text"]
    assert capsys.readouterr().err == f"alert: diffusion: {row['text']}\n"


def test_a_batch_that_comes_late_is_no_waiting_for_data(look):
    assert look(begun(), [1.0] * 60, waits=[0.45] * 60) == []
    assert look(begun(), [1.0] * 60, waits=[0.9, 0.1, 0.1] * 20) == []
    assert look(begun(), [1.0] * 60, waits=[0.9] * 60, is_first=False) == []
    assert len(look(begun(most_waiting=0.4), [1.0] * 60, waits=[0.45] * 60)) == 1


def test_it_waits_again_once_it_has_not(look):
    waits = [0.9] * 25 + [0.0] * 25 + [0.9] * 25
    assert [row["step"] for row in look(begun(), [1.0] * 75, waits=waits)] == [20, 61]


def test_what_was_usual_is_kept_over_a_restart(look):
    first, second = begun(), begun()
    look(first, [*NOISE])
    second.load_state_dict(first.state_dict())
    assert len(look(second, [3.0])) == 1
    third = begun()
    third.load_state_dict(second.state_dict())
    assert look(third, [3.0]) == []  # told before the restart


def test_deviations_are_robust():
    assert deviations(5.0, [1.0] * 19) == 0.0
    clean, dirty = deviations(2.0, NOISE), deviations(2.0, [*NOISE[:-3], 50.0, 60.0, 70.0])
    assert 0.7 * clean < dirty < clean
    assert deviations(0.5, NOISE) < 0


class StandStill(Callback):
    """At one step, until an alert is there or it has waited too long."""

    def __init__(self, step, phase=None):
        self.step, self.phase = step, phase

    def on_train_batch_end(self, trainer, pl_module, *_):
        if trainer.global_step != self.step:
            return
        if self.phase is None:
            until = time.monotonic() + 20
            while time.monotonic() < until and not alerts(pl_module):
                time.sleep(0.02)
            time.sleep(0.5)  # and it is told once
        else:
            with off_the_clock(trainer, self.phase):
                time.sleep(1.5)


def alerts(stage):
    return [row for row in stage.context.tracker.rows if row.get("event") == "alert"]


@pytest.fixture
def watched(tiny_fit, monkeypatch):
    """watched(standing) -> the stage of a fit that was watched closely."""
    monkeypatch.setattr(alert, "_LOOK_SECONDS", 0.05)

    def fit(standing):
        watching = Alert(stall_factor=2.0, least_stall_seconds=0.3)
        stage = tiny_fit(
            [Watchdog(timeout_seconds=600.0), Log(every_steps=1), watching, standing], max_steps=8, wait_seconds=0.01
        )
        assert not [thread for thread in threading.enumerate() if thread.name == "alert"]
        return stage

    monkeypatch.setattr(Watchdog, "_watch", quick_beats)
    return fit


def quick_beats(self):
    while not self._ended.wait(0.02):
        self._beat()


def test_a_stall_is_told_while_it_lasts(watched, capsys):
    (row,) = alerts(watched(StandStill(6)))
    assert (row["stage"], row["step"], row["title"]) == ("tiny", 6, "tiny: stall")
    assert row["seconds_without"] >= 0.3
    assert "after step 6, where" in row["text"]
    assert row["text"].endswith("rank 0 is at next batch of step 7")
    assert capsys.readouterr().err.count("alert: tiny: no row for") == 1


def test_an_evaluation_is_no_stall(watched):
    assert alerts(watched(StandStill(6, "validation"))) == []


def test_wrong_numbers_are_refused():
    with pytest.raises(ConfigError, match="alert.window_rows=5 must be 20 or more"):
        Alert(window_rows=5)
    with pytest.raises(ConfigError, match="stall_factor=1 above 1"):
        Alert(stall_factor=1)
