"""A run beside its neighbours: what each diffuses, how fast, and how well its pictures say their captions."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from html import escape
from pathlib import Path
from statistics import median
from typing import Any

import yaml

from sdtrain.tracker.headline import GROUPS, branch, number, percent
from sdtrain.tracker.jsonl import current_rows, read_rows, row_kind

MAX_RUNS = 20


def beside_table(directory: Path) -> str:
    """The finished runs in the same folder as a table, this one first; nothing where it stands alone.

    Images a second are the median of the rows of stage 2, so the latent and the pixel-space run (first_stage=identity)
    can be compared whatever they spent on evaluation.
    """
    own = directory.resolve()
    others = sorted(path for path in own.parent.iterdir() if path.is_dir() and path != own)
    found = [row for path in [own, *others] if (row := _row(path))][:MAX_RUNS]
    if len(found) < 2 or found[0]["run"] != own.name:
        return ""
    columns = [name for name in found[0] if any(row[name] for row in found)]
    rows = [_cells("th", columns), *(_cells("td", [row[name] for name in columns]) for row in found)]
    return f'<div class="card scroll"><table>{"".join(rows)}</table></div>'


def _row(directory: Path) -> dict[str, str]:
    """What a neighbour says of itself; nothing where it has no finished stage 2 or cannot be read."""
    try:
        config = yaml.safe_load((directory / "config.yaml").read_text(encoding="utf-8"))
        summary = json.loads((directory / "summary.json").read_text(encoding="utf-8"))
        rows = current_rows(read_rows(directory / "metrics.jsonl"))
    except (OSError, ValueError, yaml.YAMLError):
        return {}
    if not isinstance(config, Mapping) or not isinstance(summary, Mapping) or "diffusion" not in summary:
        return {}
    rows = [row for row in rows if row.get("stage") == "diffusion" and row_kind(row) == "train"]
    speeds = [row["images_per_second"] for row in rows if "images_per_second" in row]
    match = branch(summary, "diffusion", "caption_match")
    shares = {label: number(match, group, "all") for group, label in GROUPS.items()}
    return {
        "run": directory.name,
        "first stage": _part(config, "first_stage"),
        "denoiser": _part(config, "model"),
        "images a second, stage 2": f"{median(speeds):.1f}" if speeds else "",
        "images seen": str(rows[-1].get("images", "")) if rows else "",
        **{label: "" if share is None else percent(share) for label, share in shares.items()},
    }


def _part(config: Mapping[str, Any], name: str) -> str:
    node = config.get(name)
    return str(node.get("_target_", "")).rpartition(".")[2] if isinstance(node, Mapping) else ""


def _cells(tag: str, values: Iterable[str]) -> str:
    return f"<tr>{''.join(f'<{tag}>{escape(value)}</{tag}>' for value in values)}</tr>"
