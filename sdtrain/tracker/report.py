"""report.html: one self-contained file with a run's figures, pictures, curves, events and config."""

from __future__ import annotations

import os
import time
from collections.abc import Mapping
from html import escape
from pathlib import Path

from sdtrain.tracker.accounts import counts_of, data_card, looking_card, time_card
from sdtrain.tracker.beside import beside_table
from sdtrain.tracker.chart import Point, Series, line_chart, smoothed, smoothing_slider
from sdtrain.tracker.gallery import gallery
from sdtrain.tracker.headline import branch, caption_match_tables, duration, flatten, is_number, key_values, text, tiles
from sdtrain.tracker.model_card import model_card
from sdtrain.tracker.page import columns, details, page, section, table
from sdtrain.tracker.run_files import PLACE_KEYS, RunFiles

MAX_EVENTS = 200
MAX_LINES = 8  # a chart
TITLES = {"psnr": "PSNR", "ssim": "SSIM"}

SPEED_KEYS = (
    "step_seconds",
    "data_wait_fraction",
    "peak_memory_bytes",
    "peak_device_memory_bytes",
    "evaluation_seconds",
)


def write_report(run_directory: Path | str) -> Path:
    """Write `run_directory`/report.html from whatever the run has left there so far, and give back its path."""
    files = RunFiles.read(Path(run_directory))
    path = files.directory / "report.html"
    unfinished = path.with_suffix(".html.tmp")
    unfinished.write_text(_page(files), encoding="utf-8")
    os.replace(unfinished, path)
    return path


def _page(files: RunFiles) -> str:
    known = {key: files.summary.get(key) for key in ("world_size", "strategy")}
    facts = [f"{key.replace('_', ' ')} {value}" for key, value in known.items() if isinstance(value, str | int)]
    written = time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime())
    body = [
        tiles(files.summary),
        section("Does the picture say what the caption says?", caption_match_tables(files.summary)),
        section("Beside the other runs in this folder", beside_table(files.directory)),
        *(section(stage.capitalize(), _stage(files, stage)) for stage in files.stages),
        section("Evaluations", columns("".join(key_values(*found) for found in files.evaluations.items()))),
        section("Data, time and contract", _accounts(files)),
        section("Events", _events(files)),
        section("Model card", model_card(files)),
        details("All figures", key_values("", files.summary)),
        details("Config", f'<pre class="card">{escape(files.config)}</pre>' if files.config else ""),
    ]
    footer = f"Made by sdtrain from {files.directory.resolve().name}/metrics.jsonl, summary.json and samples."
    return page(files.name, ["sdtrain run", *facts, f"written {written}"], "\n".join(body), footer)


def _stage(files: RunFiles, stage: str) -> str:
    pictures = gallery(f"{stage} samples", {"": files.directory / stage / "samples"})
    main, more = _charts(*files.curves(stage))
    return pictures + smoothing_slider(main + more) + columns(main) + details("More curves", columns(more))


def _charts(train: dict[str, list[Point]], other: dict[str, list[Point]]) -> tuple[str, str]:
    """The charts everybody looks at, and the rest."""
    main = [_loss_chart(train.pop("loss", []), other.pop("val/loss", []))]
    speed = {key: columns.pop(key) for columns in (other, train) for key in SPEED_KEYS if key in columns}
    for name, lines in _grouped(other).items():
        name = name.removeprefix("val/").replace("val_raw/", "raw weights: ").replace("_", " ")
        main.append(_group_chart(TITLES.get(name, name), lines, "dB, held out" if name == "psnr" else "held out"))
    main.append(
        line_chart("Images per second", smoothed(Series("", train.pop("images_per_second", []))), from_zero=True)
    )
    groups = _grouped(train)
    for prefix, title in (("loss_at", "Loss by timestep"), ("lr", "Learning rate"), ("grad_norm", "Gradient norm")):
        if prefix in groups:
            lines = dict(sorted(groups.pop(prefix).items()))
            main.append(_group_chart(title, lines, may_be_log=prefix != "lr", is_noisy=prefix != "lr"))
    more = [_group_chart(name, lines, may_be_log=True, is_noisy=True) for name, lines in groups.items()]
    for key, points in speed.items():
        is_bytes = key.endswith("_bytes")
        points = [(x, y / 2**30) for x, y in points] if is_bytes else points
        name, _, unit = key.rpartition("_")
        title, unit = name.replace("_", " "), "GiB" if is_bytes else unit
        more.append(line_chart(title, smoothed(Series("", points)), unit, from_zero=True))
    return "".join(main), "".join(more)


def _loss_chart(training: list[Point], held_out: list[Point]) -> str:
    """Training and held-out loss in one picture, where they part is where the model starts to learn by heart."""
    series = [*smoothed(Series("training", training)), Series("held out", held_out)]
    return line_chart("Loss", series, may_be_log=True)


def _grouped(columns: dict[str, list[Point]]) -> dict[str, dict[str, list[Point]]]:
    """Keys that differ in their last part share a chart: lr/unet and lr/text; but val/psnr and val/ssim do not."""
    groups: dict[str, dict[str, list[Point]]] = {}
    for key, points in columns.items():
        parts = key.split("/")
        shared = len(parts) > 2 or (len(parts) == 2 and parts[0] not in ("val", "val_raw"))
        group, name = ("/".join(parts[:-1]), parts[-1]) if shared else (key, "")
        groups.setdefault(group, {})[name] = points
    return groups


def _group_chart(
    title: str, lines: Mapping[str, list[Point]], unit: str = "", may_be_log: bool = False, is_noisy: bool = False
) -> str:
    """As many charts as the lines want."""
    charts, series = "", [Series(name or title, points) for name, points in lines.items()]
    for start in range(0, len(series), MAX_LINES):
        shown = series[start : start + MAX_LINES]
        shown = [part for line in shown for part in smoothed(line)] if is_noisy else shown
        charts += line_chart(title if not start else f"{title}, more", shown, unit, may_be_log)
    return charts


def _accounts(files: RunFiles) -> str:
    """Where the time went, what data was read and replaced, memorisation, and the stage manifest."""
    seconds = branch(files.summary, "seconds")
    spent = {name: duration(seconds[name]) for name in sorted(seconds, key="total".__eq__) if is_number(seconds[name])}
    cards = [time_card(files.written), key_values("Time by stage", spent)]
    for stage in files.stages:
        counted = counts_of((row for row in files.rows if row.get("stage") == stage), "data/")
        cards.append(data_card(f"Data, {stage}", counted or branch(files.summary, stage, "data")))
        cards.append(looking_card(f"Looking, {stage}", branch(files.summary, stage, "looking")))
    cards.append(data_card("Data", branch(files.summary, "data")))
    cards.append(key_values("Memorisation", branch(files.summary, "diffusion", "memorisation")))
    return columns("".join(cards)) + key_values("Stage manifest", files.manifest)


def _events(files: RunFiles) -> str:
    lines = []
    for row in [row for row in files.rows if row.get("event", "image") not in ("image", "evaluation")][-MAX_EVENTS:]:
        rest = flatten({key: value for key, value in row.items() if key not in PLACE_KEYS})
        told = ", ".join(f"{key} {text(key, value)}" for key, value in rest.items())
        stamp = row.get("time")
        when = time.strftime("%Y-%m-%d %H:%M:%S", time.gmtime(stamp)) if is_number(stamp) else ""
        lines.append([when, str(row.get("stage", "")), str(row.get("step", "")), str(row["event"]), told])
    return table(["time (UTC)", "stage", "step", "event", ""], lines, "events")
