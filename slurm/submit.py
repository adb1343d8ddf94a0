"""Sends a run to Slurm: a job a stage, each after the one before; an array where a key is swept.

python slurm/submit.py +experiment=sd15_256 cluster=slurm num_nodes=8 devices=8 [--dry-run] [--array seed=0,1,2]

The config is composed and checked here, so that a mistake costs no time in the queue. DIR/slurm/config.yaml holds it; a
job that composes another one later, since a file was edited, ends with 2 and names the keys. The scripts, made from
slurm/job.sh, and their logs stand in DIR/slurm.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from omegaconf import DictConfig

from sdtrain.agreement import doubts
from sdtrain.config import ClusterConfig, load_config
from sdtrain.continuation import check_continuation, config_text, write_config
from sdtrain.errors import ConfigError
from sdtrain.sweep import jobs

TEMPLATE = Path(__file__).with_name("job.sh")
DECIDED_HERE = ("stages", "num_nodes", "output_dir")  # by job, whatever was typed


@dataclass
class Run:
    """One run directory with what is typed for it: everything, and what only this task of an array has."""

    cfg: DictConfig
    directory: Path
    arguments: list[str]


def main(argv: list[str] | None = None) -> int:
    """Compose, check, render, and send."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("overrides", metavar="KEY=VALUE", nargs="+", help="as for python -m sdtrain")
    parser.add_argument("--config-dir", metavar="DIR", help="a directory of your own configs, beside the package's")
    parser.add_argument("--array", metavar="KEY=A,B,C", help="a run for each value, as the tasks of one array")
    parser.add_argument("--dry-run", action="store_true", help="print the scripts; write and send nothing")
    parser.add_argument("--test-only", action="store_true", help="let Slurm check the scripts; send nothing")
    options = parser.parse_intermixed_args(argv)
    try:
        runs = compose(options.overrides, options.array, options.config_dir)
        home = Path(os.path.commonpath([run.directory for run in runs])) / "slurm"
        scripts = {stage: render(runs, stage, home, options.config_dir) for stage in runs[0].cfg.stages}
        for line in dict.fromkeys(line for run in runs for line in doubts(run.cfg)):
            print(f"warning: {line}", file=sys.stderr)
        if options.dry_run:
            print("\n".join(scripts.values()), end="")
            return 0
        if shutil.which("sbatch") is None:
            raise ConfigError("there is no sbatch on this machine; --dry-run prints the scripts")
        check_queue(runs)
        write(runs, scripts, home)
        for stage in scripts:
            sbatch("--test-only", home / f"{stage}.sh")
        if not options.test_only:
            send(runs, list(scripts), home)
    except ConfigError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    return 0


def compose(overrides: list[str], array: str | None, config_directory: str | None) -> list[Run]:
    """The runs that are meant, checked as `python -m sdtrain` does, and as jobs."""
    runs = []
    for arguments in jobs([*overrides, array], config_directory) if array else [overrides]:
        cfg = load_config(arguments, config_directory)
        runs.append(Run(cfg, Path(cfg.output_dir).expanduser().resolve(), arguments))
    for run in runs:
        check(run.cfg, run.directory)
    return runs


def check(cfg: DictConfig, directory: Path) -> None:
    """Refuse what could be composed, but not be a job."""
    if cfg.cluster is None:
        raise ConfigError("no cluster is named; write cluster=slurm, or the name of your own in configs/cluster/")
    for key in ("devices", "num_nodes"):
        if not isinstance(cfg[key], int):
            raise ConfigError(f"{key}={cfg[key]}: a job asks for a number; write {key}=8")
    if cfg.resume == "never":
        raise ConfigError("resume=never: a job that is requeued would begin anew; take a new output_dir instead")
    lead = lead_seconds(cfg.cluster)
    for stage in cfg.stages:
        minutes = cfg.cluster[stage].time_minutes or cfg.cluster.time_minutes
        if minutes * 60 <= lead:
            raise ConfigError(
                f"cluster.time_minutes={minutes}: the signal to stop comes {lead} s ahead of the limit, which leaves"
                " no time to train; give more, or lower cluster.max_step_seconds and max_save_seconds"
            )
    if not re.fullmatch(r"[\w./=,@+-]+", str(directory)):
        raise ConfigError(f"output_dir={directory}: a job's directory is made of letters, digits and ./=,@+-_")
    if directory.is_dir() and any(child.is_dir() and child.name != "slurm" for child in directory.iterdir()):
        check_continuation(directory, cfg)


def lead_seconds(cluster: ClusterConfig) -> int:
    """How long before its limit a job is told to stop: the step it is in, the save, and a minute."""
    return cluster.max_step_seconds + cluster.max_save_seconds + 60


def render(runs: list[Run], stage: str, home: Path, config_directory: str | None) -> str:
    """The script of a stage's job."""
    cfg, cluster = runs[0].cfg, runs[0].cfg.cluster
    values = {
        "job_name": f"{re.sub(r'[^A-Za-z0-9_.=-]', '_', cfg.name)}-{stage}",  # so it is never `bash` or `interactive`
        "num_nodes": cluster[stage].num_nodes or cfg.num_nodes,
        "devices": cfg.devices,
        "cpus_per_task": cluster.cpus_per_task,
        "time_minutes": cluster[stage].time_minutes or cluster.time_minutes,
        "lead_seconds": lead_seconds(cluster),
        "log": home / f"{stage}-{'%A_%a' if len(runs) > 1 else '%j'}.log",
        "working_directory": shlex.quote(str(Path.cwd())),
        "options": "\n".join(f"#SBATCH {line}" for line in sbatch_lines(cfg, len(runs))),
        "run": run_lines(runs, stage, config_directory),
        "master_address": cluster.master_address or "$address",
        "setup": "\n".join(cluster.setup),
        "command": shlex.join([*cluster.srun, *cluster.container, cluster.python or sys.executable, "-m", "sdtrain"]),
    }
    return fill(TEMPLATE, values)


def fill(template: Path, values: Mapping[str, object]) -> str:
    """A template with its %{names} replaced; a line that is nothing but an empty value goes."""
    empty = {f"%{{{name}}}" for name, value in values.items() if value == ""}
    lines = [line for line in template.read_text().splitlines(keepends=True) if line.strip() not in empty]
    text = re.sub(r"%\{(\w+)\}", lambda found: str(values[found[1]]), "".join(lines))
    return re.sub(r"\n{3,}", "\n\n", text)


def sbatch_lines(cfg: DictConfig, num_runs: int) -> list[str]:
    """The options that not every job has."""
    cluster = cfg.cluster
    lines = [] if num_runs == 1 else [f"--array=0-{num_runs - 1}"]
    if cfg.accelerator != "cpu":
        lines.append(f"--gpus-per-node={f'{cluster.gpu_type}:' if cluster.gpu_type else ''}{cfg.devices}")
    named = {"mem": cluster.memory, "partition": cluster.partition, "account": cluster.account, "qos": cluster.qos}
    named |= {"constraint": cluster.constraint, "exclude": cluster.exclude}
    return [*lines, *(f'--{key}="{value}"' for key, value in named.items() if value is not None), *cluster.lines]


def run_lines(runs: list[Run], stage: str, config_directory: str | None) -> str:
    """Bash: the run directory and its arguments; in an array those of each task."""
    cfg = runs[0].cfg
    typed = [[a for a in run.arguments if key_of(a) not in DECIDED_HERE] for run in runs]
    for run, arguments in zip(runs, typed):
        arguments.append(f"cluster.submitted={hashlib.sha256(config_text(run.cfg).encode()).hexdigest()}")
    common = [argument for argument in typed[0] if all(argument in arguments for arguments in typed)]
    shared = ["--config-dir", str(Path(config_directory).resolve())] if config_directory else []
    shared += [*common, f"stages=[{stage}]", f"num_nodes={cfg.cluster[stage].num_nodes or cfg.num_nodes}"]
    lines = [f"run={runs[0].directory}"]
    if len(runs) > 1:
        tasks = [shlex.join(argument for argument in arguments if argument not in common) for arguments in typed]
        lines = ["case $SLURM_ARRAY_TASK_ID in"]
        lines += [f"{i}) run={run.directory} own=({tasks[i]}) ;;" for i, run in enumerate(runs)]
        lines.append("esac")
    lines += ["arguments=(", *(f"    {shlex.quote(argument)}" for argument in shared)]
    lines += ['    "${own[@]}"'] * (len(runs) > 1) + ["    \"output_dir='$run'\"", ")"]
    return "\n".join(lines)


def key_of(argument: str) -> str:
    """What an override sets."""
    return argument.lstrip("+~").partition("=")[0]


def check_queue(runs: list[Run]) -> None:
    """Refuse a second job in a directory whose first still waits or runs: both would write there."""
    queued = subprocess.run(["squeue", "--me", "-r", "-h", "-o", "%i"], capture_output=True, text=True).stdout.split()
    for run in runs:
        record = run.directory / "slurm" / "jobs.jsonl"
        sent = [json.loads(line)["job"] for line in record.read_text().splitlines()] if record.exists() else []
        if found := next((job for job in sent if job in queued), None):
            raise ConfigError(f"output_dir={run.directory} is being trained by job {found}; scancel {found} first")


def write(runs: list[Run], scripts: dict[str, str], home: Path) -> None:
    """The scripts, and in every run directory its config."""
    home.mkdir(parents=True, exist_ok=True)
    for stage, script in scripts.items():
        (home / f"{stage}.sh").write_text(script)
    for run in runs:
        (run.directory / "slurm").mkdir(parents=True, exist_ok=True)
        (run.directory / "slurm" / "config.yaml").write_text(config_text(run.cfg))
        write_config(run.directory, run.cfg)


def send(runs: list[Run], stages: list[str], home: Path) -> None:
    """Submit; a stage waits for the one before, in an array each task for its own."""
    before = None
    for stage in stages:
        wait = "aftercorr" if len(runs) > 1 else "afterok"
        chained = [f"--dependency={wait}:{before}", "--kill-on-invalid-dep=yes"] if before else []
        before = sbatch("--parsable", *chained, home / f"{stage}.sh").partition(";")[0]
        for number, run in enumerate(runs):
            job = f"{before}_{number}" if len(runs) > 1 else before
            with (run.directory / "slurm" / "jobs.jsonl").open("a") as file:
                file.write(json.dumps({"job": job, "stage": stage, "time": round(time.time(), 3)}) + "\n")
        after = f" after {chained[0].partition(':')[2]}" if chained else ""
        print(f"{stage}: job {before}{f', tasks 0-{len(runs) - 1}' if len(runs) > 1 else ''}{after}")
    print(f"logs    {home}\nnext    python slurm/status.py {shlex.join(str(run.directory) for run in runs)}")


def sbatch(*arguments: str | Path) -> str:
    """What sbatch prints.

    Raises:
        ConfigError: with what it says, where it refuses.
    """
    done = subprocess.run(["sbatch", *map(str, arguments)], capture_output=True, text=True)
    if done.returncode:
        said = " ".join(done.stderr.replace("sbatch: error:", "").replace("allocation failure:", "").split())
        raise ConfigError(f"{arguments[-1]}: Slurm refuses it: {said}")
    return done.stdout.strip()


if __name__ == "__main__":
    sys.exit(main())
