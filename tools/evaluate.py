"""Measure a run by a named protocol: draw its pictures, and compare their features with a reference's.

python tools/evaluate.py RUN [--protocol quick] [--num-images N] [--guidance 1.5 3 7.5] [--prompts FILE] [--reference
DIR] [--devices 2]

A protocol is a file of configs/evaluation/. Everything a figure depends on is written beside it, in RUN/eval/.
"""

from __future__ import annotations

import argparse
import csv
import hashlib
import io
import json
import math
import os
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sdtrain.errors import ConfigError, RunError

if TYPE_CHECKING:
    from sdtrain.interop.evaluation import Evaluation

KEYS = {"source", "num_images", "split", "guidance", "batch", "num_kept", "extractors", "metric"}
OPTIONAL = {"perceptual", "num_training", "detector"}
_SEPARATORS = {".csv": ",", ".tsv": "\t"}
CHANGEABLE = ("num_images", "guidance", "split", "sampler", "num_steps", "seed", "weights")


def main(argv: list[str] | None = None) -> int:
    """Prints the figures and the path of their file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", metavar="RUN", type=Path, help="the output_dir of a run")
    parser.add_argument("--protocol", default="quick", help="of configs/evaluation/, or a file; default: %(default)s")
    parser.add_argument("--metric", nargs="+", metavar="NAME", help="these of the protocol's alone")
    parser.add_argument("--num-images", metavar="N", type=int, help="default: the protocol's")
    parser.add_argument("--guidance", metavar="SCALE", type=float, nargs="+", help="default: the protocol's")
    parser.add_argument("--split", help="of the run's data, for captions and reference; default: the protocol's")
    parser.add_argument(
        "--prompts", metavar="FILE", type=Path, help="captions, one a line; a .jsonl, .csv or .tsv with `prompt`"
    )
    parser.add_argument("--sampler", metavar="NAME", help="one of configs/sampler/; default: the run's")
    parser.add_argument("--num-steps", metavar="N", type=int, help="of the sampler; default: the run's")
    parser.add_argument("--seed", metavar="N", type=int, default=0, help="default: %(default)s")
    parser.add_argument("--weights", default="ema", help="ema, raw, or a file of tools/ema.py; default: %(default)s")
    parser.add_argument("--reference", metavar="DIR", type=Path, help="stored moments instead of the split's pictures")
    parser.add_argument("--write-reference", metavar="DIR", type=Path, help="store the split's moments for later")
    parser.add_argument("--devices", metavar="N", type=int, default=1, help="processes; default: %(default)s")
    args = parser.parse_args(argv)
    if args.devices > 1 and "RANK" not in os.environ:
        launch = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={args.devices}", __file__]
        return subprocess.run([sys.executable, *launch, *(sys.argv[1:] if argv is None else argv)]).returncode
    try:
        path = evaluate(args)
    except (ConfigError, RunError) as error:
        print(error, file=sys.stderr)
        return error.exit_code
    if path is not None:
        for result in json.loads(path.read_text())["results"]:
            print(json.dumps(result))
        print(path)
    return 0


def evaluate(args: argparse.Namespace) -> Path | None:
    """The file that was written; None on every rank but the first."""
    protocol = read_protocol(args)
    prompts = None if args.prompts is None else read_prompts(args.prompts)

    from sdtrain.interop.evaluation import Evaluation, Ranks  # heavy: after what can be told at once

    with Ranks.joined() as ranks:
        evaluation = Evaluation.load(args.run, protocol, prompts, ranks)
        evaluation.refer(args.reference, args.write_reference)
        results = [evaluation.measure(scale) for scale in protocol["guidance"]]
        return write(args.run, evaluation, results) if ranks.rank == 0 else None


def read_protocol(args: argparse.Namespace) -> dict[str, Any]:
    """The protocol's file, with what the command line changes."""
    import yaml

    from sdtrain.config import config_directory

    folder = config_directory() / "evaluation"
    file = Path(args.protocol)
    if not file.is_file():
        file = folder / f"{args.protocol}.yaml"
    if not file.is_file():
        names = ", ".join(sorted(path.stem for path in folder.glob("*.yaml")))
        raise ConfigError(f"--protocol: {args.protocol!r} is neither a file nor one of {names}")
    protocol = yaml.safe_load(file.read_text(encoding="utf-8"))
    if not isinstance(protocol, dict) or set(protocol) - OPTIONAL != KEYS:
        raise ConfigError(f"--protocol: {file} must have exactly the keys {', '.join(sorted(KEYS))}")
    given = {name: getattr(args, name) for name in CHANGEABLE}
    changed = {name: value for name, value in given.items() if value is not None}
    protocol = {"protocol": file.stem, **dict.fromkeys(CHANGEABLE), **protocol, **changed}
    if protocol["num_images"] < 2:
        raise ConfigError(f"--num-images: {protocol['num_images']} pictures have no moments; give at least 2")
    if args.devices < 1:
        raise ConfigError(f"--devices: {args.devices} processes measure nothing; give at least 1")
    if not all(scale is None or math.isfinite(scale) for scale in protocol["guidance"] or ()):
        raise ConfigError(f"--guidance: {protocol['guidance']} is not finite")
    if args.metric:
        asked = {key: [n for n in names if n in args.metric] for key, names in protocol["metric"].items()}
        known = {name for names in protocol["metric"].values() for name in names}
        if missing := set(args.metric) - known:
            unknown, has = (", ".join(sorted(names)) for names in (missing, known))
            raise ConfigError(f"--metric: {file.name} measures no {unknown}; it has {has}")
        protocol["metric"] = {key: names for key, names in asked.items() if names}
    return protocol


def read_prompts(file: Path) -> list[dict[str, Any]]:
    """The lines that are not empty, as {"prompt": line}; of a .jsonl its objects; of a .csv or .tsv the column that
    PartiPrompts and DrawBench call Prompt and Prompts.
    """
    try:
        text = file.read_text(encoding="utf-8-sig")
    except (OSError, ValueError) as error:
        raise ConfigError(f"--prompts: {file} cannot be read: {getattr(error, 'strerror', None) or error}") from error
    if file.suffix in _SEPARATORS:
        table = csv.DictReader(io.StringIO(text), delimiter=_SEPARATORS[file.suffix])
        column = next((name for name in table.fieldnames or () if name.lower() in ("prompt", "prompts")), None)
        if column is None:
            raise ConfigError(f"--prompts: {file} has no column named prompt, but {table.fieldnames}")
        lines = [(row[column] or "").strip() for row in table]
    else:
        lines = [line.strip() for line in text.splitlines()]
    prompts = [
        _object(line, file, number) if file.suffix == ".jsonl" else {"prompt": line}
        for number, line in enumerate(lines, 1)
        if line
    ]
    if not prompts:
        raise ConfigError(f"--prompts: {file} holds no prompt")
    return prompts


def _object(line: str, file: Path, number: int) -> dict[str, Any]:
    try:
        prompt = json.loads(line)
    except ValueError as error:
        raise ConfigError(f"--prompts: {file} cannot be read: line {number} is no JSON") from error
    if not isinstance(prompt, dict) or not isinstance(prompt.get("prompt"), str):
        raise ConfigError(f"--prompts: {file}: line {number} has no `prompt`")
    return prompt


def write(run: Path, evaluation: Evaluation, results: list[dict[str, Any]]) -> Path:
    """RUN/eval/PROTOCOL_STEP_HASH.json, whose hash is the protocol's, a row of the run's metrics.jsonl, its figures in
    the mirror of the stage that was measured, under eval/PROTOCOL/, and RUN/report.html anew.
    """
    from sdtrain.tracker.report import write_report

    told = evaluation.told()
    digest = hashlib.sha256(json.dumps(told, sort_keys=True).encode()).hexdigest()
    name = f"{told['protocol']}_step_{told['step']:08d}_{digest[:8]}"
    path = run / "eval" / f"{name}.json"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_suffix(".tmp")
        temporary.write_text(json.dumps({"protocol": told, "results": results}, indent=2) + "\n")
        temporary.replace(path)
        note(run, evaluation, name, told, results)
        write_report(run)
    except OSError as error:
        raise ConfigError(f"{error.filename or path} cannot be written: {error.strerror or error}") from error
    return path


def note(run: Path, evaluation: Evaluation, name: str, told: dict[str, Any], results: list[dict[str, Any]]) -> None:
    """The figures as rows: where a run's own go."""
    from sdtrain.build import build
    from sdtrain.continuation import resolve_and_redact
    from sdtrain.tracker.fanout import Fanout
    from sdtrain.tracker.jsonl import JsonlTracker
    from sdtrain.tracker.none import NullTracker

    cfg = evaluation.subject.cfg
    stage = "autoencoder" if evaluation.subject.pipe is None else "diffusion"
    rows, mirror = JsonlTracker(run / "metrics.jsonl"), Fanout(NullTracker(), [build(cfg.tracker)])
    mirror.start(run.resolve(), cfg.name, stage, resolve_and_redact(cfg))
    about = {key: told[key] for key in ("step", "sampler", "num_steps", "seed", "weights")}
    for result in results:
        rows.log({"event": "evaluation", "stage": "evaluation", "eval": name, **about, **result})
        place = "eval" + "".join(f"/{part}" for part in (told["protocol"], scale_of(result["guidance"])) if part)
        mirror.log({"step": told["step"], **{f"{place}/{figure}": value for figure, value in result.items()}})
    rows.finish({})
    mirror.finish({})


def scale_of(guidance: float | None) -> str:
    """Of figures at several scales, which."""
    return "" if guidance is None else f"guidance_{guidance:g}"


if __name__ == "__main__":
    sys.exit(main())
