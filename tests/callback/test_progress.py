"""What people see: a live line on a terminal, plain lines in a file."""

import contextlib
import io
import os
import pty
import re
import sys

import pytest

from sdtrain.callback.log import Log
from sdtrain.callback.progress import Progress, duration, eta_seconds, figures, short

LINE = re.compile(
    r"tiny 1/2  step \d+/\d+  loss \d[\d.e+-]*  \d[\d.e+]* images/s(  eta \d+s)?",
)


def test_plain_lines_hold_no_control_codes_and_are_few(tiny_fit, capsys):
    tiny_fit([Log(every_steps=2), Progress()], max_steps=40)
    output = capsys.readouterr().out
    lines = output.splitlines()
    assert len(lines) == 5  # the plan; the first row and the last: the fit takes less than ten seconds
    plan, lines = lines[:3], lines[3:]
    assert plan[0] == "tiny 1/2  parameters: weight 9, bias 1, 1.25 M frozen"
    assert plan[1] == "tiny 1/2  steps 0 to 40: 160 images; a step has 4 = 4 x 1 accumulated x 1 ranks"
    assert plan[2].startswith("tiny 1/2  on 1 x cpu, 32-true, SingleDeviceStrategy; in /")
    assert all(LINE.fullmatch(line) for line in lines)
    assert "step 2/40" in lines[0]
    assert "eta" in lines[0]
    assert "step 40/40" in lines[1]
    assert "eta" not in lines[1]
    assert not set(output) & {"\r", "\x1b"}


def test_a_line_per_row_when_time_has_passed(tiny_fit, capsys):
    tiny_fit([Progress(every_seconds=0.0), Log(every_steps=2)], max_steps=6)  # before Log: a row later
    assert re.findall(r"step (\d)/6", capsys.readouterr().out) == ["2", "4", "6"]


def test_progress_asks_the_stage_for_nothing(tiny_fit, capsys):
    assert tiny_fit([Progress(every_seconds=0.0)], max_steps=3).asked == []
    assert "images/s" not in capsys.readouterr().out


def read_all(leader):
    """A terminal hands over what was written bit by bit, and an error once the other side is closed."""
    output = b""
    with contextlib.suppress(OSError):
        while chunk := os.read(leader, 1 << 16):
            output += chunk
    os.close(leader)
    return output.decode()


def test_a_terminal_gets_one_live_line(tiny_fit, monkeypatch):
    leader, follower = pty.openpty()
    monkeypatch.setenv("TERM", "xterm")
    with os.fdopen(follower, "w") as terminal:
        monkeypatch.setattr(sys, "stdout", terminal)
        tiny_fit([Log(every_steps=2), Progress()], max_steps=6)
    output = read_all(leader)
    assert output.index("parameters: weight 9") < output.index("\x1b[")
    assert "tiny 1/2" in output
    assert "step 6/6" in output
    assert "images/s" in output
    assert output.count("\x1b[?25l") == output.count("\x1b[?25h") == 1  # the cursor is hidden and comes back


def test_an_exception_gives_the_terminal_back(tiny_fit, monkeypatch):
    class Tty(io.StringIO):
        def isatty(self):
            return True

    class Fails(Log):
        def act(self, trainer, pl_module):
            raise RuntimeError("in the fit")

    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setattr(sys, "stdout", terminal := Tty())
    with pytest.raises(RuntimeError, match="in the fit"):
        tiny_fit([Progress(), Fails(every_steps=2)])
    assert "\x1b[?25h" in terminal.getvalue()


def test_eta_leaves_out_the_warm_up_and_counts_evaluations():
    first = {"step": 10, "seconds": 100.0, "step_seconds": 10.0, "images_per_second": 1.0, "loss": 2.0}
    later = {"step": 30, "seconds": 120.0, "step_seconds": 0.5, "images_per_second": 412.4, "loss": 0.12345}
    assert eta_seconds(first, first, 110) == 1000.0
    assert eta_seconds(first, later, 110) == 80.0
    assert figures(first, later, 110) == ["loss 0.1235", "412 images/s", "eta 1m20s"]
    assert figures(first, {**later, "step": 110}, 110) == ["loss 0.1235", "412 images/s"]
    assert figures(None, None, 110) == []


def test_numbers_are_short():
    told = [short(value, "FLOP") for value in (0, 999, 999.6, 2.134e9, 8.2e14)]
    assert told == ["0 FLOP", "999 FLOP", "1 kFLOP", "2.13 GFLOP", "820 TFLOP"]
    assert [short(value) for value in (12, 859_520_964)] == ["12", "860 M"]


def test_durations():
    assert [duration(seconds) for seconds in (0.4, 7, 80, 11520, 187200)] == ["0s", "7s", "1m20s", "3h12m", "2d04h"]
