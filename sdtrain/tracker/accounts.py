"""Where a run's time and its data went: what was kept, what was done twice after a restart, what was replaced."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from html import escape
from typing import Any

from sdtrain.tracker.headline import branch, duration, is_number, number, percent, text
from sdtrain.tracker.jsonl import current_rows, row_kind

LOSSES = ("replaced", "lost")  # counts under these are shown as a share of what was read


@dataclass
class TimeSpent:
    """Of a run, in seconds of the wall clock, over all its processes."""

    wall: float = 0.0
    training: float = 0.0  # of steps that still count
    repeated: float = 0.0  # of steps that a restart took back
    evaluation: float = 0.0
    saving: float = 0.0  # that training stood still for
    num_restarts: int = 0

    @classmethod
    def of(cls, rows: list[dict[str, Any]]) -> TimeSpent:
        """From every row as written, those that a restart superseded among them."""
        spent = cls()
        kept = {id(row) for row in current_rows(rows)}
        steps: dict[Any, list[float]] = {}
        stopped: set[Any] = set()
        for row in rows:
            stage, step = row.get("stage"), row.get("step")
            spent.evaluation += _seconds(row, "evaluation_seconds")
            spent.saving += _seconds(row, "stall_seconds")
            if row.get("event") == "stop":
                stopped.add(stage)
            if row_kind(row) != "train" or not is_number(step):
                continue
            before = steps.setdefault(stage, [])
            spent.num_restarts += bool(stage in stopped or (before and step <= before[-1]))
            stopped.discard(stage)
            num_steps = step - max((earlier for earlier in before if earlier < step), default=0)
            before.append(step)
            if id(row) in kept:
                spent.training += num_steps * _seconds(row, "step_seconds")
            else:
                spent.repeated += num_steps * _seconds(row, "step_seconds")
        times = [(row["time"], row.get("stage")) for row in rows if is_number(row.get("time"))]
        # A launch that finds all done, and an evaluation, may come months later.
        ends = [time for time, stage in times if stage not in (None, "evaluation")]
        first = _seconds(rows[0], "seconds") if rows and "event" not in rows[0] else 0.0
        spent.wall = max(ends) - min(times)[0] + first if ends else 0.0
        return spent


def time_card(rows: list[dict[str, Any]]) -> str:
    """Shares of the wall clock, with goodput, the share spent on steps that still count, first."""
    spent = TimeSpent.of(rows)
    if not spent.wall or not spent.training:
        return ""
    told = spent.training + spent.repeated + spent.evaluation + spent.saving
    parts = {
        "Steps that count (goodput)": spent.training,
        "Steps done again after a restart": spent.repeated,
        "Evaluation during training": spent.evaluation,
        "Waiting for checkpoints": spent.saving,
        "Anything else: start, samples, queue": max(spent.wall - told, 0.0),
    }
    shares = "".join(_share_row(name, duration(value), value / spent.wall) for name, value in parts.items())
    title = f"From the first row to the last: {duration(spent.wall)}, restarts: {spent.num_restarts}"
    return _card(title, shares)


def data_card(title: str, counts: Mapping[str, Any]) -> str:
    """What was read, and of what could not be used: how many, and which share of what was read."""
    read = counts.get("read")
    rows = ""
    for name, value in counts.items():
        is_loss = name.split("/")[0] in LOSSES and is_number(value) and is_number(read) and read
        rows += _share_row(_words(name), text(name, value), value / read if is_loss else None)
    return _card(title, rows)


def looking_card(title: str, looking: Mapping[str, Any]) -> str:
    """What looking at a stage while it trained took, by kind, and which share of the stage's time it is."""
    seconds = {name: value for name, value in branch(looking, "seconds").items() if is_number(value)}
    rows = "".join(_share_row(name, duration(value), None) for name, value in seconds.items())
    together = _share_row("together", duration(sum(seconds.values())), number(looking, "share"))
    return _card(title, rows + together if rows else "")


def _card(title: str, rows: str) -> str:
    if not rows:
        return ""
    return f'<div class="card scroll"><h3>{escape(title)}</h3><table class="shares"><tbody>{rows}</tbody></table></div>'


def _share_row(name: str, value: str, share: float | None) -> str:
    told, bar = "", ""
    if share is not None:
        told = percent(share)
        bar = f'<div class="bar"><i style="width:{min(100 * share, 100):.1f}%"></i></div>'
    cells = "".join(f"<td>{cell}</td>" for cell in (escape(value), told, bar))
    return f'<tr><th scope="row">{escape(name)}</th>{cells}</tr>'


def _words(name: str) -> str:
    """replaced/too_small as "replaced: too small"; the shard of replaced_in/a/0001.tar keeps its name."""
    first, _, rest = name.partition("/")
    if first == "replaced_in":
        return f"replaced in {rest}"
    return ": ".join(part.replace("_", " ") for part in (first, rest) if part)


def _seconds(row: Mapping[str, Any], key: str) -> float:
    value = row.get(key)
    return float(value) if is_number(value) else 0.0


def counts_of(rows: Iterable[Mapping[str, Any]], prefix: str) -> dict[str, Any]:
    """The last value of each key under the prefix, without it."""
    found = {key: value for row in rows for key, value in row.items() if key.startswith(prefix)}
    return {key.removeprefix(prefix): value for key, value in found.items()}
