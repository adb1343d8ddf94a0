"""Charts: ticks, scales, and that what matters stays in the picture."""

import re

import pytest

from sdtrain.tracker.chart import (
    HEIGHT,
    MAX_POINTS,
    WIDTH,
    Series,
    format_number,
    line_chart,
    linear_ticks,
    smooth,
    thin,
)


@pytest.mark.parametrize(
    ("low", "high", "ticks"),
    [
        (0, 1, [0, 0.2, 0.4, 0.6, 0.8, 1.0]),
        (23.6, 28.2, [24, 25, 26, 27, 28]),
        (-3e-4, 9e-4, [-2e-4, 0, 2e-4, 4e-4, 6e-4, 8e-4]),
    ],
)
def test_ticks_are_round_and_inside(low, high, ticks):
    assert linear_ticks(low, high) == pytest.approx(ticks)


def test_numbers_are_short():
    numbers = [0, 0.1234, 1234.5, 45_000, 12_345_678, 5.86e9, 1.97e14, 1e-4, -2.5e-7, 28.4]
    shown = ["0", "0.123", "1234", "45k", "12.3M", "5.86G", "197T", "1e-4", "-2.5e-7", "28.4"]
    assert [format_number(number) for number in numbers] == shown


def test_thinning_keeps_the_ends_and_every_spike():
    points = [(step, 1.0) for step in range(50_000)]
    points[31_234] = (31_234, 99.0)
    points[777] = (777, -5.0)
    kept = thin(points)
    assert len(kept) <= MAX_POINTS
    assert {points[0], points[-1], points[777], points[31_234]} <= set(kept)
    assert kept == sorted(kept)


def test_smoothing_has_no_lag_and_keeps_the_ends():
    line = [(step, 2.0 * step) for step in range(500)]
    assert [y for _, y in smooth(line)] == pytest.approx([y for _, y in line])


@pytest.mark.parametrize(
    "values",
    [[1.0, 1.0], [0.0, 0.0], [1e-9, 1e9], [-5.0, 5.0], [1e30, 2e30], [3.0, 3.0000000001], [0.0, 1e-300]],
)
@pytest.mark.parametrize("may_be_log", [True, False])
def test_every_mark_lies_inside_the_picture(values, may_be_log):
    svg = line_chart("x", [Series("a", list(enumerate(values)))], may_be_log=may_be_log)
    places = re.findall(r"[ML]([-\d.]+) ([-\d.]+)", svg)
    assert len(places) == 2
    assert all(0 <= float(x) <= WIDTH and 0 <= float(y) <= HEIGHT for x, y in places)
    assert svg.count("<text") >= 3


def test_a_logarithmic_axis_only_where_allowed_and_useful():
    def place(may_be_log, last):
        svg = line_chart("x", [Series("a", [(0, 1.0), (1, 10.0), (2, last)])], may_be_log=may_be_log)
        return [float(y) for _, y in re.findall(r"[ML]([-\d.]+) ([-\d.]+)", svg)]

    first, middle, last = place(True, 100.0)
    assert first - middle == pytest.approx(middle - last, abs=0.2)
    first, middle, last = place(False, 100.0)
    assert first - middle < 0.2 * (middle - last)


def test_a_legend_only_for_several_lines_and_nothing_for_no_points():
    one, two = Series("a", [(0, 1.0), (1, 2.0)]), Series("<b>", [(0, 1.0), (1, 3.0)])
    raw = Series("a", [(0, 1.5), (1, 2.5)], is_faint=True)
    assert "<span><i" not in line_chart("x", [raw, one])
    assert line_chart("x", [one, two]).count("<span><i") == 2
    assert "<b>&lt;" not in line_chart("x", [one, two])
    assert "&lt;b&gt;" in line_chart("x", [one, two])
    assert line_chart("x", [Series("a", [(0, 1.0)]), Series("b", [])]) == ""
