"""Line charts as inline SVG: axes, ticks, units, a legend, and the points for the report's cursor."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from html import escape

WIDTH, HEIGHT = 440, 230
LEFT, RIGHT, TOP, BOTTOM = 54, 10, 10, 36
MAX_POINTS = 300
NUM_COLOURS = 8
SMOOTHING = 10  # of 600: the share of a line that a running mean reaches to each side, where the slider begins
MIN_SMOOTHED = 20  # points; fewer are shown as they are
LOG_RATIO = 15  # values that span more than this are drawn on a logarithmic axis, where one is allowed

Point = tuple[float, float]


@dataclass(frozen=True)
class Series:
    """One line of a chart. A faint one is the raw values behind its smoothed self, and takes its colour."""

    name: str
    points: list[Point]
    is_faint: bool = False


@dataclass(frozen=True)
class Axis:
    """A range of values on a stretch of pixels."""

    low: float
    high: float
    start: float
    end: float
    is_log: bool = False

    def place(self, value: float) -> float:
        low, high = (math.log10(self.low), math.log10(self.high)) if self.is_log else (self.low, self.high)
        position = math.log10(max(value, 1e-300)) if self.is_log else value
        return self.start + (position - low) / (high - low) * (self.end - self.start)

    def ticks(self) -> list[float]:
        if not self.is_log:
            return linear_ticks(self.low, self.high)
        exponents = range(math.floor(math.log10(self.low)), math.ceil(math.log10(self.high)) + 1)
        steps = (1,) if len(exponents) > 4 else (1, 2, 5) if len(exponents) > 2 else (1, 1.5, 2, 3, 5, 7)
        values = [step * 10.0**exponent for exponent in exponents for step in steps]
        return [value for value in values if self.low <= value <= self.high]


def line_chart(
    title: str, series: list[Series], unit: str = "", may_be_log: bool = False, from_zero: bool = False
) -> str:
    """A <figure> of the series over the step, or nothing where no series has two points."""
    raw = {s.name: averaged(s.points) for s in series if s.is_faint}
    colours = _colours(series)  # also of those that are not drawn, so that a run has one colour in all charts
    series = [Series(s.name, thin(s.points), s.is_faint) for s in series if len(s.points) > 1]
    if not series:
        return ""
    x_axis, y_axis = _axes(series, may_be_log, from_zero)
    marks = "".join(_path(s, x_axis, y_axis, colours[s.name]) for s in series)
    shown = [s for s in series if not s.is_faint] or series
    data = [
        {"name": s.name, "colour": colours[s.name], "points": _shorts(s.points)}
        | ({"raw": _shorts(raw[s.name])} if s.name in raw else {})
        for s in shown
    ]
    y_numbers = [y_axis.low, y_axis.high, y_axis.start, y_axis.end, y_axis.is_log]
    legend = ""
    if len(shown) > 1:
        legend = "".join(f'<span><i class="k{colours[s.name]}"></i>{escape(s.name)}</span>' for s in shown)
    label = f"{title} ({unit})" if unit else title
    return (
        f'<figure class="chart" data-low="{x_axis.low:g}" data-high="{x_axis.high:g}" data-y="{json.dumps(y_numbers)}"'
        f' data-series="{escape(json.dumps(data))}">'
        f"<figcaption><b>{escape(title)}</b> <span>{escape(unit)}</span><output></output></figcaption>"
        f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(label)} over steps">'
        f"{_frame(x_axis, y_axis)}{marks}"
        f'<line class="cursor" x1="0" x2="0" y1="{TOP}" y2="{HEIGHT - BOTTOM}"/></svg>'
        f'<div class="legend">{legend}</div></figure>'
    )


def smoothed(series: Series) -> list[Series]:
    """A long line as its smoothed self with the raw values faint behind it, a short one as it is."""
    if len(series.points) < MIN_SMOOTHED:
        return [series]
    return [Series(series.name, series.points, is_faint=True), Series(series.name, smooth(series.points))]


def smoothing_slider(charts: str) -> str:
    """For the smoothed lines among the charts, which stand in one section with it; nothing where there are none."""
    if 'class="faint' not in charts:
        return ""
    slider = f'<input type="range" min="0" max="60" value="{SMOOTHING}" aria-label="smoothing of the curves">'
    return f'<label class="smoothing">smoothing{slider}</label>'


def averaged(points: list[Point], max_points: int = MAX_POINTS) -> list[Point]:
    """At most so many points, each the mean of as many neighbours: what a running mean may be taken of."""
    size = -(-len(points) // max_points) if points else 1
    parts = [points[start : start + size] for start in range(0, len(points), size)]
    return [tuple(sum(values) / len(part) for values in zip(*part, strict=True)) for part in parts]


def smooth(points: list[Point]) -> list[Point]:
    """A centred running mean, taken twice: no lag, so it can be read against the raw values."""
    return _running_mean(_running_mean(points))


def thin(points: list[Point], max_points: int = MAX_POINTS) -> list[Point]:
    """At most so many points; of each bucket the lowest and the highest stay, so a spike stays."""
    if len(points) <= max_points:
        return points
    num_buckets = max_points // 2 - 1
    kept = {0, len(points) - 1}
    for bucket in range(num_buckets):
        indices = range(bucket * len(points) // num_buckets, (bucket + 1) * len(points) // num_buckets)
        kept |= {min(indices, key=lambda i: points[i][1]), max(indices, key=lambda i: points[i][1])}
    return [points[index] for index in sorted(kept)]


def linear_ticks(low: float, high: float, about: int = 6) -> list[float]:
    """Round values inside [low, high], 1, 2 or 5 times a power of ten apart."""
    raw = (high - low) / about
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(factor * power for factor in (1, 2, 5, 10) if factor * power >= raw * 0.999)
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return [index * step for index in range(first, last + 1)]


def format_number(value: float) -> str:
    """1.97T, 5.86G, 12.3M, 45k, 1234, 0.123, 1e-4."""
    size = abs(value)
    for unit, scale in (("T", 1e12), ("G", 1e9), ("M", 1e6)):
        if size >= scale:
            return f"{value / scale:.3g}{unit}"
    if size >= 1e4:
        return f"{value / 1e3:.3g}k"
    if size >= 1e3:
        return f"{value:.0f}"
    if size < 1e-3 and value:
        mantissa, exponent = f"{value:.2e}".split("e")
        return f"{float(mantissa):g}e{int(exponent)}"
    return f"{value:.3g}"


def _axes(series: list[Series], may_be_log: bool, from_zero: bool) -> tuple[Axis, Axis]:
    xs = [x for s in series for x, _ in s.points]
    ys = [y for s in series for _, y in s.points]
    low, high = min(ys), max(ys)
    is_log = may_be_log and low > 0 and high / low > LOG_RATIO
    if is_log:
        low, high = low / 1.15, high * 1.15
    else:
        low = min(low, 0.0) if from_zero else low
        margin = 0.06 * (high - low) or abs(high) * 0.1 or 1.0
        low, high = (low if from_zero and low == 0 else low - margin), high + margin
    x_axis = Axis(min(0.0, *xs), max(1.0, *xs), LEFT, WIDTH - RIGHT)  # from step 0, so that charts can be compared
    return x_axis, Axis(low, high, HEIGHT - BOTTOM, TOP, is_log)


def _frame(x_axis: Axis, y_axis: Axis) -> str:
    parts = []
    for value in y_axis.ticks():
        y = y_axis.place(value)
        parts.append(f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>')
        parts.append(f'<text x="{LEFT - 6}" y="{y + 3.5:.1f}" text-anchor="end">{format_number(value)}</text>')
    base = HEIGHT - BOTTOM
    for value in x_axis.ticks():
        x = x_axis.place(value)
        anchor = "end" if x > WIDTH - RIGHT - 12 else "middle"
        parts.append(f'<line class="axis" x1="{x:.1f}" x2="{x:.1f}" y1="{base}" y2="{base + 4}"/>')
        parts.append(f'<text x="{x:.1f}" y="{base + 16}" text-anchor="{anchor}">{format_number(value)}</text>')
    parts.append(f'<line class="axis" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{base}" y2="{base}"/>')
    middle = (LEFT + WIDTH - RIGHT) / 2
    parts.append(f'<text class="name" x="{middle:.0f}" y="{HEIGHT - 4}" text-anchor="middle">step</text>')
    return "".join(parts)


def _path(series: Series, x_axis: Axis, y_axis: Axis, colour: int) -> str:
    places = [(x_axis.place(x), y_axis.place(y)) for x, y in series.points]
    line = "M" + "L".join(f"{x:.1f} {y:.1f}" for x, y in places)
    kind = "faint" if series.is_faint else "line"
    dots = ""
    if not series.is_faint and len(places) <= 25:
        dots = "".join(f'<circle class="c{colour}" cx="{x:.1f}" cy="{y:.1f}" r="2.4"/>' for x, y in places)
    return f'<path class="{kind} c{colour}" d="{line}"/>{dots}'


def _colours(series: list[Series]) -> dict[str, int]:
    names = list(dict.fromkeys(s.name for s in series))
    return {name: index % NUM_COLOURS for index, name in enumerate(names)}


def _shorts(points: list[Point]) -> list[list[float]]:
    return [[x, float(f"{y:.5g}")] for x, y in points]


def _running_mean(points: list[Point]) -> list[Point]:
    reach = max(1, len(points) * SMOOTHING // 600)
    sums = [0.0]
    for _, y in points:
        sums.append(sums[-1] + y)
    smoothed = []
    for index, (x, _) in enumerate(points):
        side = min(reach, index, len(points) - 1 - index)
        low, high = index - side, index + side + 1
        smoothed.append((x, (sums[high] - sums[low]) / (high - low)))
    return smoothed
