"""report.html: one self-contained file with a run's figures, pictures, curves, events and config."""

from __future__ import annotations

import base64
import io
import json
import os
import re
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from html import escape
from pathlib import Path
from typing import Any

from PIL import Image

from sdtrain.tracker.beside import beside_table
from sdtrain.tracker.chart import LEFT, RIGHT, Point, Series, line_chart, smooth
from sdtrain.tracker.headline import branch, caption_match_tables, duration, flatten, is_number, key_values, text, tiles
from sdtrain.tracker.jsonl import current_rows, read_rows, row_kind

MAX_PICTURES = 24  # a stage; the first and the last are always among them
MAX_PICTURE_PIXELS = 1400  # width
MAX_EVENTS = 200
MAX_LINES = 8  # a chart
TITLES = {"psnr": "PSNR", "ssim": "SSIM"}

PLACE_KEYS = {"stage", "step", "images", "time", "seconds", "event"}
SPEED_KEYS = (
    "step_seconds",
    "data_wait_fraction",
    "peak_memory_bytes",
    "peak_device_memory_bytes",
    "evaluation_seconds",
)


@dataclass
class RunFiles:
    """What a run directory holds; whatever is missing or unreadable is empty."""

    directory: Path
    rows: list[dict[str, Any]] = field(default_factory=list)
    summary: Mapping[str, Any] = field(default_factory=dict)
    manifest: Mapping[str, Any] = field(default_factory=dict)
    config: str = ""

    @classmethod
    def read(cls, directory: Path) -> RunFiles:
        metrics = directory / "metrics.jsonl"
        return cls(
            directory,
            current_rows(read_rows(metrics)) if metrics.is_file() else [],
            _json(directory / "summary.json"),
            _json(directory / "autoencoder" / "manifest.json"),
            _text(directory / "config.yaml"),
        )

    @property
    def name(self) -> str:
        found = re.search(r"^name:\s*['\"]?([^'\"\n]+)", self.config, re.MULTILINE)
        return found.group(1).strip() if found else self.directory.resolve().name

    @property
    def stages(self) -> list[str]:
        """In the order they were run."""
        written = [str(row["stage"]) for row in self.rows if row.get("stage")]
        drawn = sorted(path.parent.name for path in self.directory.glob("*/samples"))
        return list(dict.fromkeys([*written, *drawn]))


def write_report(run_directory: Path | str) -> Path:
    """Write `run_directory`/report.html from whatever the run has left there so far, and give back its path."""
    files = RunFiles.read(Path(run_directory))
    path = files.directory / "report.html"
    unfinished = path.with_suffix(".html.tmp")
    unfinished.write_text(_page(files), encoding="utf-8")
    os.replace(unfinished, path)
    return path


def _page(files: RunFiles) -> str:
    here = Path(__file__).parent
    script = (here / "report.js").read_text(encoding="utf-8")
    script = script.replace("PLOT_LEFT", str(LEFT)).replace("PLOT_RIGHT", str(RIGHT))
    known = {key: files.summary.get(key) for key in ("world_size", "strategy")}
    facts = [f"{key.replace('_', ' ')} {value}" for key, value in known.items() if isinstance(value, str | int)]
    written = time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime())
    policy = "default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'unsafe-inline'"
    stages = "".join(_stage(files, stage) for stage in files.stages)
    return f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="{policy}">
<title>{escape(files.name)} · sdtrain</title>
<style>{(here / "report.css").read_text(encoding="utf-8")}</style>
</head>
<body>
<main>
<header><h1>{escape(files.name)}</h1><p>{escape(" · ".join(["sdtrain run", *facts, f"written {written}"]))}</p></header>
{tiles(files.summary)}
{_section("Does the picture say what the caption says?", caption_match_tables(files.summary))}
{_section("Beside the other runs in this folder", beside_table(files.directory))}
{stages}
{_section("Data, time and contract", _accounts(files))}
{_section("Events", _events(files))}
{_details("All figures", key_values("", files.summary))}
{_details("Config", f'<pre class="card">{escape(files.config)}</pre>' if files.config else "")}
<footer>Made by sdtrain from {escape(files.directory.resolve().name)}/metrics.jsonl, summary.json and samples.</footer>
</main>
<script>{script}</script>
</body>
</html>
"""


def _stage(files: RunFiles, stage: str) -> str:
    rows = [row for row in files.rows if row.get("stage") == stage]
    gallery = _gallery(files.directory / stage / "samples", stage)
    main, more = _charts(rows)
    details = _details("More curves", f'<div class="columns">{more}</div>' if more else "")
    charts = f'<div class="columns">{main}</div>' if main else ""
    return _section(stage.capitalize(), gallery + charts + details)


def _charts(rows: list[dict[str, Any]]) -> tuple[str, str]:
    """The charts everybody looks at, and the rest."""
    train = _columns([row for row in rows if row_kind(row) == "train"])
    other = _columns([row for row in rows if row_kind(row) not in ("train", "event")])
    main = [_loss_chart(train.pop("loss", []), other.pop("val/loss", []))]
    speed = {key: columns.pop(key) for columns in (other, train) for key in SPEED_KEYS if key in columns}
    for name, lines in _grouped(other).items():
        name = name.removeprefix("val/").replace("_", " ")
        main.append(_group_chart(TITLES.get(name, name), lines, "dB, held out" if name == "psnr" else "held out"))
    main.append(line_chart("Images per second", [Series("", train.pop("images_per_second", []))], from_zero=True))
    groups = _grouped(train)
    for prefix, title in (("lr", "Learning rate"), ("grad_norm", "Gradient norm")):
        if prefix in groups:
            main.append(_group_chart(title, groups.pop(prefix), may_be_log=prefix == "grad_norm"))
    more = [_group_chart(name, lines, may_be_log=True) for name, lines in groups.items()]
    for key, points in speed.items():
        is_bytes = key.endswith("_bytes")
        points = [(x, y / 2**30) for x, y in points] if is_bytes else points
        name, _, unit = key.rpartition("_")
        title, unit = name.replace("_", " "), "GiB" if is_bytes else unit
        more.append(line_chart(title, [Series("", points)], unit, from_zero=True))
    return "".join(main), "".join(more)


def _loss_chart(training: list[Point], held_out: list[Point]) -> str:
    """Training and held-out loss in one picture, where they part is where the model starts to learn by heart."""
    is_long = len(training) >= 20
    series = [Series("training", training, is_faint=is_long)]
    if is_long:
        series.append(Series("training", smooth(training)))
    return line_chart("Loss", [*series, Series("held out", held_out)], may_be_log=True)


def _columns(rows: list[dict[str, Any]]) -> dict[str, list[Point]]:
    """(step, value) pairs of each numeric key."""
    columns: dict[str, list[Point]] = {}
    for row in rows:
        for key, value in row.items():
            if key not in PLACE_KEYS and is_number(value) and is_number(row.get("step")):
                columns.setdefault(key, []).append((row["step"], float(value)))
    return columns


def _grouped(columns: dict[str, list[Point]]) -> dict[str, dict[str, list[Point]]]:
    """Keys that differ in their last part share a chart: lr/unet and lr/text; but val/psnr and val/ssim do not."""
    groups: dict[str, dict[str, list[Point]]] = {}
    for key, points in columns.items():
        parts = key.split("/")
        shared = len(parts) > 2 or (len(parts) == 2 and parts[0] != "val")
        group, name = ("/".join(parts[:-1]), parts[-1]) if shared else (key, "")
        groups.setdefault(group, {})[name] = points
    return groups


def _group_chart(title: str, lines: Mapping[str, list[Point]], unit: str = "", may_be_log: bool = False) -> str:
    series = [Series(name or title, points) for name, points in list(lines.items())[:MAX_LINES]]
    return line_chart(title, series, unit, may_be_log)


def _gallery(folder: Path, stage: str) -> str:
    """The sample grids with a slider over the steps, standing at the last."""
    paths = sorted(folder.glob("step_*.png"))
    if len(paths) > MAX_PICTURES:
        last = MAX_PICTURES - 1
        paths = [paths[round(index * (len(paths) - 1) / last)] for index in range(MAX_PICTURES)]
    pictures = [(int(path.stem.split("_")[1]), data) for path in paths if (data := _embedded(path))]
    if not pictures:
        return ""
    images = "".join(
        f'<img src="{data}" alt="{escape(stage)} samples at step {step}" data-step="{step}"'
        f"{'' if index == len(pictures) - 1 else ' hidden'}>"
        for index, (step, data) in enumerate(pictures)
    )
    first, last = pictures[0][0], pictures[-1][0]
    place, name = len(pictures) - 1, escape(stage)
    slider = f'<input type="range" min="0" max="{place}" value="{place}" aria-label="{name} samples: which step">'
    slider = f"step {first}{slider}" if place else ""
    slider = f"<label>{slider}<output>step {last}</output></label>"
    return f'<div class="card gallery">{slider}<div class="scroll">{images}</div></div>'


def _embedded(path: Path) -> str:
    """The picture as a data URL, smaller than its PNG; nothing for one that a crash cut off."""
    try:
        with Image.open(path) as image:
            picture = image.convert("RGB")
    except (OSError, SyntaxError):
        return ""
    if picture.width > MAX_PICTURE_PIXELS:
        height = round(picture.height * MAX_PICTURE_PIXELS / picture.width)
        picture = picture.resize((MAX_PICTURE_PIXELS, max(1, height)), Image.Resampling.LANCZOS)
    buffer = io.BytesIO()
    picture.save(buffer, "WEBP", quality=88)
    return "data:image/webp;base64," + base64.b64encode(buffer.getvalue()).decode()


def _accounts(files: RunFiles) -> str:
    """Where the time went, what data was read and replaced, memorisation, and the stage manifest."""
    spent = {name: duration(value) for name, value in branch(files.summary, "seconds").items() if is_number(value)}
    cards = [key_values("Time", spent)]
    for stage in files.stages:
        counted = {key: value for row in files.rows if row.get("stage") == stage for key, value in row.items()}
        counted = {key[5:]: value for key, value in counted.items() if key.startswith("data/")}
        cards.append(key_values(f"Data, {stage}", counted or branch(files.summary, stage, "data")))
    cards.append(key_values("Data", branch(files.summary, "data")))
    cards.append(key_values("Memorisation", branch(files.summary, "diffusion", "memorisation")))
    cards.append(key_values("Stage manifest", files.manifest))
    filled = "".join(cards)
    return f'<div class="columns">{filled}</div>' if filled else ""


def _events(files: RunFiles) -> str:
    events = [row for row in files.rows if "event" in row and row["event"] != "image"][-MAX_EVENTS:]
    if not events:
        return ""
    lines = []
    for row in events:
        rest = flatten({key: value for key, value in row.items() if key not in PLACE_KEYS})
        told = ", ".join(f"{key} {text(key, value)}" for key, value in rest.items())
        stamp = row.get("time")
        when = time.strftime("%Y-%m-%d %H:%M:%S", time.gmtime(stamp)) if is_number(stamp) else ""
        cells = (when, row.get("stage", ""), row.get("step", ""), row["event"], told)
        lines.append("<tr>" + "".join(f"<td>{escape(str(cell))}</td>" for cell in cells) + "</tr>")
    head = "".join(f"<th>{name}</th>" for name in ("time (UTC)", "stage", "step", "event", ""))
    body = "".join(lines)
    return f'<div class="card scroll"><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'


def _section(title: str, content: str) -> str:
    return f"<section><h2>{escape(title)}</h2>{content}</section>" if content else ""


def _details(title: str, content: str) -> str:
    return f"<details><summary>{title}</summary>{content}</details>" if content else ""


def _text(path: Path) -> str:
    return path.read_text(encoding="utf-8", errors="replace") if path.is_file() else ""


def _json(path: Path) -> Mapping[str, Any]:
    try:
        found = json.loads(_text(path))
    except ValueError:
        return {}
    return found if isinstance(found, Mapping) else {}
