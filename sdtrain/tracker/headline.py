"""The report's figures: headline tiles, the caption-match tables, and plain tables of names and values."""

from __future__ import annotations

import math
from collections.abc import Mapping
from html import escape
from typing import Any, TypeGuard

from sdtrain.tracker.chart import format_number

GROUPS = {"one": "One object", "two": "Two objects", "three": "Three objects", "heldout": "Held-out compositions"}
LIMITS = ("reconstruction", "ceiling", "floor")


def tiles(summary: Mapping[str, Any]) -> str:
    """The figures people ask for first, each with its limits under it."""
    shown = []
    for key, label, unit in (("psnr", "Reconstruction PSNR", "dB"), ("ssim", "Reconstruction SSIM", "")):
        if (value := number(summary, "autoencoder", key)) is not None:
            shown.append(_tile(label, f"{value:.2f}" if key == "psnr" else f"{value:.3f}", unit, "held-out pictures"))
    match = branch(summary, "diffusion", "caption_match")
    for group, label in GROUPS.items():
        if (value := number(match, group, "all")) is not None:
            limits = [
                f"{limit} {percent(found)}"
                for limit in ("ceiling", "reconstruction", "floor")
                if (found := number(match, limit, group, "all")) is not None
            ]
            shown.append(_tile(f"Caption match, {label.lower()}", percent(value), "", " · ".join(limits)))
    if (ratio := number(summary, "diffusion", "memorisation", "ratio")) is not None:
        shown.append(_tile("Memorisation ratio", f"{ratio:.2f}", "", "1: no nearer to training pictures; 0: copies"))
    if (total := number(summary, "seconds", "total")) is not None:
        shown.append(_tile("Time", duration(total), "", "all stages"))
    return f'<div class="tiles">{"".join(shown)}</div>' if shown else ""


def caption_match_tables(summary: Mapping[str, Any]) -> str:
    """A table per group of captions: attributes down, the model beside its limits across, and a bar."""
    match = branch(summary, "diffusion", "caption_match")
    tables = []
    for group, label in GROUPS.items():
        scores = branch(match, group)
        rows = [_match_row(match, group, name) for name in scores if number(scores, name) is not None]
        if rows:
            head = "".join(f"<th>{name}</th>" for name in ("", "model", *LIMITS, ""))
            tables.append(
                f'<div class="card scroll"><h3>{label}</h3><table class="match"><thead><tr>{head}</tr></thead>'
                f"<tbody>{''.join(rows)}</tbody></table></div>"
            )
    if not tables:
        return ""
    note = (
        "Share of captions whose picture shows what they say, read back by a reader that is trained on nothing the "
        "model made. Ceiling: real held-out pictures. Reconstruction: the same through the autoencoder. Floor: "
        "shuffled captions. In the bar: the model filled, ceiling and floor as marks."
    )
    return f'<p class="note">{note}</p><div class="columns wide">{"".join(tables)}</div>'


def key_values(title: str, values: Mapping[str, Any]) -> str:
    """A card with a plain table of names and values, nested names joined by dots; nothing where there is none."""
    rows = "".join(
        f'<tr><th scope="row">{escape(name)}</th><td>{escape(text(name, value))}</td></tr>'
        for name, value in flatten(values).items()
    )
    if not rows:
        return ""
    heading = f"<h3>{escape(title)}</h3>" if title else ""
    return f'<div class="card scroll">{heading}<table class="values"><tbody>{rows}</tbody></table></div>'


def flatten(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        if isinstance(value, Mapping):
            flat |= flatten(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = value
    return flat


def branch(tree: Any, *keys: str) -> Mapping[str, Any]:
    """The mapping at this place of the tree, an empty one where there is none."""
    for key in keys:
        tree = tree.get(key) if isinstance(tree, Mapping) else None
    return tree if isinstance(tree, Mapping) else {}


def number(tree: Any, *keys: str) -> float | None:
    """The finite number at this place of the tree, None where there is none."""
    value = branch(tree, *keys[:-1]).get(keys[-1])
    return value if is_number(value) else None


def is_number(value: Any) -> TypeGuard[float]:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def percent(value: float) -> str:
    return f"{100 * value:.1f} %"


def text(name: str, value: Any) -> str:
    """A value as people read it; the unit is taken from the name."""
    if not is_number(value):
        return ", ".join(text("", item) for item in value) or "none" if isinstance(value, list | tuple) else str(value)
    parts = name.split(".")
    if "seconds" in parts or name.endswith("_seconds"):
        return duration(value)
    if parts[-1] == "bytes" or name.endswith("_bytes"):
        return f"{value / 2**30:.2f} GiB" if value >= 2**30 else f"{value / 2**20:.1f} MiB"
    return f"{value:,}" if isinstance(value, int) else format_number(value)


def duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours} h {minutes:02d} min"
    return f"{minutes} min {rest:02d} s" if minutes else f"{seconds:.3g} s"


def _tile(label: str, value: str, unit: str, note: str) -> str:
    suffix = f" <small>{escape(unit)}</small>" if unit else ""
    return (
        f'<div class="tile"><span class="label">{escape(label)}</span>'
        f'<span class="value">{escape(value)}{suffix}</span><span class="note">{escape(note)}</span></div>'
    )


def _match_row(match: Mapping[str, Any], group: str, name: str) -> str:
    value = number(match, group, name) or 0.0
    limits = {limit: number(match, limit, group, name) for limit in LIMITS}
    cells = "".join(f"<td>{'–' if found is None else percent(found)}</td>" for found in limits.values())
    marks = "".join(
        f'<b class="{limit}" style="left:{100 * found:.1f}%"></b>'
        for limit, found in limits.items()
        if found is not None and limit != "reconstruction"
    )
    bar = f'<div class="bar"><i style="width:{100 * value:.1f}%"></i>{marks}</div>'
    strong = ' class="total"' if name == "all" else ""
    label = "all together" if name == "all" else name
    cells = f'<td class="model">{percent(value)}</td>{cells}<td>{bar}</td>'
    return f'<tr{strong}><th scope="row">{escape(label)}</th>{cells}</tr>'
