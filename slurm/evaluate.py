"""Sends tools/evaluate.py to Slurm, for a run of that cluster: after its last job, where that still waits or runs.

python slurm/evaluate.py RUN [--devices 8] [--minutes 120] [--dry-run] [--protocol coco30k --guidance 1.5 3 7.5 ...]

What else tools/evaluate.py takes is given to it as it is. Partition, account, containers and what to load before the
start are those of the run. The script and its log stand in RUN/slurm.
"""

from __future__ import annotations

import argparse
import json
import re
import shlex
import subprocess
import sys
from pathlib import Path

from omegaconf import DictConfig, OmegaConf
from submit import fill, sbatch, sbatch_lines

from sdtrain.errors import ConfigError

TEMPLATE = Path(__file__).with_name("evaluate.sh")
TOOL = Path(__file__).parents[1] / "tools" / "evaluate.py"


def main(argv: list[str] | None = None) -> int:
    """Render, and send."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("run", metavar="RUN", type=Path, help="the output_dir of a run that slurm/submit.py sent")
    parser.add_argument("--devices", metavar="N", type=int, default=1, help="of one node; default: %(default)s")
    parser.add_argument("--minutes", metavar="N", type=int, help="until the job is ended; default: the run's")
    parser.add_argument("--dry-run", action="store_true", help="print the script; write and send nothing")
    options, more = parser.parse_known_args(argv)
    try:
        directory = options.run.expanduser().resolve()
        cfg = read(directory)
        script = render(cfg, directory, options.devices, options.minutes or cfg.cluster.time_minutes, more)
        if options.dry_run:
            print(script, end="")
            return 0
        file = directory / "slurm" / "evaluate.sh"
        file.parent.mkdir(exist_ok=True)
        file.write_text(script)
        before = waited_for(directory)
        chained = [f"--dependency=afterok:{before}", "--kill-on-invalid-dep=yes"] if before else []
        job = sbatch("--parsable", *chained, file).partition(";")[0]
    except ConfigError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    print(f"evaluate: job {job}{f' after {before}' if before else ''}\nfigures {directory / 'eval'}")
    return 0


def read(directory: Path) -> DictConfig:
    """The run's config, which names a cluster."""
    file = directory / "config.yaml"
    if not file.is_file():
        raise ConfigError(f"{directory} is no run: it has no config.yaml")
    cfg = OmegaConf.load(file)
    if cfg.cluster is None:
        raise ConfigError(f"{file} names no cluster, as slurm/submit.py did not send it: call {TOOL} itself")
    return cfg


def render(cfg: DictConfig, directory: Path, devices: int, time_minutes: int, more: list[str]) -> str:
    """The job's script."""
    cluster = cfg.cluster
    call = [cluster.python or sys.executable, str(TOOL), str(directory), "--devices", str(devices), *more]
    values = {
        "job_name": f"{re.sub(r'[^A-Za-z0-9_.=-]', '_', directory.name)}-evaluate",
        "cpus": cluster.cpus_per_task * devices,
        "time_minutes": time_minutes,
        "log": directory / "slurm" / "evaluate-%j.log",
        "working_directory": shlex.quote(str(Path.cwd())),
        "options": "\n".join(f"#SBATCH {line}" for line in sbatch_lines(OmegaConf.merge(cfg, {"devices": devices}), 1)),
        "setup": "\n".join(cluster.setup),
        "command": shlex.join([*cluster.srun, *cluster.container, *call]),
    }
    return fill(TEMPLATE, values)


def waited_for(directory: Path) -> str | None:
    """The last job of the run, where Slurm still knows it as one to come to its end."""
    record = directory / "slurm" / "jobs.jsonl"
    if not record.exists():
        return None
    job = json.loads(record.read_text().splitlines()[-1])["job"]
    queued = subprocess.run(["squeue", "--me", "-r", "-h", "-o", "%i"], capture_output=True, text=True).stdout.split()
    return job if job in queued else None


if __name__ == "__main__":
    sys.exit(main())
