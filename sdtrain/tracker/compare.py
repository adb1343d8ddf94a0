"""Several runs in one page: figures, curves and sample grids side by side, and where their configs differ."""

from __future__ import annotations

import os
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from sdtrain.errors import ConfigError
from sdtrain.tracker.chart import NUM_COLOURS, Point, Series, line_chart, smoothed, smoothing_slider
from sdtrain.tracker.gallery import gallery
from sdtrain.tracker.headline import flatten, is_number, text
from sdtrain.tracker.page import columns, details, page, section, table
from sdtrain.tracker.run_files import RunFiles

MAX_RUNS = NUM_COLOURS  # more lines than that cannot be told apart
FIRST = ("loss", "val/loss")  # charts everybody looks at; of the rest, what is held out comes before what is trained
DETAILS = {"floor", "ceiling", "reconstruction", "shape", "colour", "size", "position", "ground", "fit", "evaluation"}
DETAILS |= {"recognition", "looking", "data", "flops_per_image", "peak_flops", "matmul_peak_flops"}  # under a click
PATHS = ("name", "output_dir")  # differ always, and tell nothing


def write_comparison(directories: list[Path], path: Path) -> Path:
    """Write the page and give back its path.

    Raises:
        ConfigError: where a directory is not a run, or there are too many.
    """
    if not 2 <= len(directories) <= MAX_RUNS:
        raise ConfigError(f"compare: give 2 to {MAX_RUNS} runs, not {len(directories)}")
    names = _names(directories)
    for directory in directories:
        if not (directory / "config.yaml").is_file():
            raise ConfigError(f"compare: {directory} is not a run: it has no config.yaml")
    runs = {name: RunFiles.read(directory) for name, directory in zip(names, directories, strict=True)}
    unfinished = path.with_name(f"{path.name}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        unfinished.write_text(_page(runs), encoding="utf-8")
        os.replace(unfinished, path)
    except OSError as error:
        raise ConfigError(f"--out: cannot write {path}: {error.strerror or error}") from error
    return path


def _names(directories: list[Path]) -> list[str]:
    """As much of each path's end as tells the runs apart."""
    paths = [directory.resolve() for directory in directories]
    if len(set(paths)) < len(paths):
        raise ConfigError("compare: the same run is given twice")
    for num_parts in range(1, max(len(path.parts) for path in paths)):
        names = ["/".join(path.parts[-num_parts:]) for path in paths]
        if len(set(names)) == len(names):
            return names
    return [str(path) for path in paths]


def _page(runs: Mapping[str, RunFiles]) -> str:
    stages = dict.fromkeys(stage for run in runs.values() for stage in run.stages)
    body = [
        section("Where the configs differ", _config_table(runs)),
        section("Figures", _figures(runs)),
        *(section(stage.capitalize(), _stage(runs, stage)) for stage in stages),
    ]
    written = time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime())
    footer = "Made by sdtrain from each run's metrics.jsonl, summary.json, config.yaml and samples."
    return page(" / ".join(runs), [f"{len(runs)} sdtrain runs", f"written {written}"], "".join(body), footer)


def _stage(runs: Mapping[str, RunFiles], stage: str) -> str:
    """The grids at the same step side by side, and a chart a key with a line a run."""
    grids = gallery(f"{stage} samples", {name: run.directory / stage / "samples" for name, run in runs.items()})
    trained, held_out = {}, {}
    for name, run in runs.items():
        trained[name], held_out[name] = run.curves(stage)
    charts: dict[str, str] = {}
    for lines in (held_out, trained):
        for key in dict.fromkeys(key for curves in lines.values() for key in curves):
            charts[key] = _chart(key, {name: curves.get(key, []) for name, curves in lines.items()})
    main = [key for key in (*FIRST, *charts) if key in charts and (key in FIRST or key.startswith("val/"))]
    main = [*dict.fromkeys(main), *(key for key in ("images_per_second",) if key in charts)]
    first, rest = "".join(charts[key] for key in main), "".join(charts[key] for key in charts if key not in main)
    return grids + smoothing_slider(first + rest) + columns(first) + details("More curves", columns(rest))


def _chart(key: str, lines: Mapping[str, list[Point]]) -> str:
    series = [part for name, points in lines.items() for part in smoothed(Series(name, points))]
    title = {"loss": "Loss, training", "val/loss": "Loss, held out"}.get(key, key.replace("_", " "))
    return line_chart(title, series, may_be_log=key != "images_per_second", from_zero=key == "images_per_second")


def _figures(runs: Mapping[str, RunFiles]) -> str:
    """Every number of the summaries and of evaluations, those that are the same everywhere left out."""
    found = {name: {k: v for k, v in _told(run).items() if is_number(v)} for name, run in runs.items()}
    first, rest = [], []
    for key in dict.fromkeys(key for figures in found.values() for key in figures):
        cells = [figures.get(key) for figures in found.values()]
        if len(set(cells)) > 1:
            row = [key, *("–" if cell is None else text(key, cell) for cell in cells)]
            (rest if DETAILS & set(key.split(".")) else first).append(row)
    return table(["", *runs], first, "beside") + details("More figures", table(["", *runs], rest, "beside"))


def _told(run: RunFiles) -> dict[str, Any]:
    evaluated = {f"{asked}: {k}": v for asked, figures in run.evaluations.items() for k, v in figures.items()}
    return flatten(run.summary) | evaluated


def _config_table(runs: Mapping[str, RunFiles]) -> str:
    """The keys that are not the same in all runs."""
    found = {name: _config(run) for name, run in runs.items()}
    rows = []
    for key in dict.fromkeys(key for config in found.values() for key in config):
        cells = [str(config[key]) if key in config else "–" for config in found.values()]
        if key not in PATHS and len(set(cells)) > 1:
            rows.append([key, *cells])
    return table(["", *runs], rows, "beside") or '<p class="note">Nowhere, but for their names and places.</p>'


def _config(run: RunFiles) -> dict[str, Any]:
    try:
        config = yaml.safe_load(run.config)
    except yaml.YAMLError as error:
        raise ConfigError(f"compare: {run.directory / 'config.yaml'} cannot be read") from error
    return flatten(config) if isinstance(config, Mapping) else {}
