"""The jobs of a run: how far each is, how often it started, and how much of its work and its time was kept.

python slurm/status.py DIR [DIR ...]
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
import time
from dataclasses import dataclass, field
from math import inf
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf
from rich.console import Console
from rich.table import Table

from sdtrain.tracker.headline import duration
from sdtrain.tracker.jsonl import read_rows

COLUMNS = ("job", "stage", "state", "nodes", "attempts", "step", "steps kept", "trained", "since sent")


@dataclass
class Job:
    """A stage's job, from what submit.py, the job's attempts and the run wrote down.

    Args:
        sent: when, in seconds as time.time() counts.
        starts: of each attempt: when, and the step it went on from.
        rows: of metrics.jsonl, this stage's, while this was its job.
        earlier_seconds: that the stage had trained before this job.
    """

    name: str
    stage: str
    sent: float
    starts: list[tuple[float, int]] = field(default_factory=list)
    rows: list[dict[str, Any]] = field(default_factory=list)
    earlier_seconds: float = 0.0

    @property
    def step(self) -> int:
        """Where it is, as the last row says."""
        return self.rows[-1]["step"] if self.rows else 0

    @property
    def num_kept(self) -> int:
        """Steps that still count."""
        return self.step - self.starts[0][1] if self.rows and self.starts else 0

    @property
    def num_run(self) -> int:
        """Steps of all attempts: what one did after its last checkpoint was done again by the next."""
        total, ends = 0, [start for start, _ in self.starts[1:]] + [inf]
        for (start, first), end in zip(self.starts, ends, strict=False):
            reached = [row["step"] for row in self.rows if start <= row["time"] < end]
            total += max(max(reached, default=first) - first, 0)
        return total

    @property
    def kept_seconds(self) -> float:
        """In the steps that count, with the evaluations between them; a checkpoint carries it on."""
        return max(trained_seconds(self.rows) - self.earlier_seconds, 0.0)

    def since_sent_seconds(self, is_over: bool) -> float:
        """Until now, or until the last that was heard of it."""
        heard = [self.sent, *(start for start, _ in self.starts), *(row["time"] for row in self.rows)]
        return (max(heard) if is_over else time.time()) - self.sent


def main(argv: list[str] | None = None) -> int:
    """Prints a table for each run directory."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("directories", metavar="DIR", nargs="+", type=Path, help="a run's directory")
    code = 0
    for directory in parser.parse_args(argv).directories:
        if (directory / "slurm" / "jobs.jsonl").exists():
            describe(directory, Console(width=None if sys.stdout.isatty() else 120, markup=False))
        else:
            print(f"error: {directory} holds no run that slurm/submit.py sent", file=sys.stderr)
            code = 2
    return code


def describe(directory: Path, console: Console) -> None:
    """One run: its jobs in the order they were sent, and what they were good for together."""
    jobs, config = read_jobs(directory), OmegaConf.load(directory / "config.yaml")
    table, alive, seconds = Table(title=str(directory), title_justify="left"), False, 0.0
    for column in COLUMNS:
        table.add_column(column)
    for job in jobs:
        record = ask(job.name)
        is_over = record.get("JobState") not in ("PENDING", "RUNNING", "COMPLETING", "REQUEUED")
        alive |= not is_over
        since_sent = job.since_sent_seconds(is_over)
        seconds = max(seconds, job.sent + since_sent - jobs[0].sent)
        table.add_row(
            job.name,
            job.stage,
            state(record),
            record.get("NodeList", "(null)").replace("(null)", "-"),
            str(len(job.starts)),
            f"{job.step}/{config[job.stage].trainer.max_steps}",
            f"{job.num_kept} of {job.num_run}",
            duration(job.kept_seconds),
            duration(since_sent),
        )
    console.print(table)
    kept, run = sum(job.num_kept for job in jobs), sum(job.num_run for job in jobs)
    if run:
        share = sum(job.kept_seconds for job in jobs) / seconds
        console.print(f"goodput: {kept / run:.1%} of the steps, {share:.1%} of the time since it was sent")
    if (directory / "exit.json").exists() and not alive:
        end = json.loads((directory / "exit.json").read_text())
        console.print(f"ended with {end['exit_code']}: {end['reason']}")


def read_jobs(directory: Path) -> list[Job]:
    """The jobs of a run, with what each of them did."""
    sent = [json.loads(line) for line in (directory / "slurm" / "jobs.jsonl").read_text().splitlines()]
    jobs = [Job(each["job"], each["stage"], each["time"]) for each in sent]
    attempts, metrics = directory / "slurm" / "attempts", directory / "metrics.jsonl"
    for line in attempts.read_text().splitlines() if attempts.exists() else ():
        name, start, found = line.split(maxsplit=2)
        for job in (job for job in jobs if job.name == name):
            steps = re.findall(rf"\b{job.stage}/checkpoints/step_(\d+)", found)
            job.starts.append((float(start), max(map(int, steps), default=0)))
    rows = [row for row in (read_rows(metrics) if metrics.exists() else ()) if isinstance(row.get("step"), int)]
    for job in jobs:
        end = min((other.sent for other in jobs if other.stage == job.stage and other.sent > job.sent), default=inf)
        own = [row for row in rows if row.get("stage") == job.stage]
        job.earlier_seconds = trained_seconds([row for row in own if row["time"] < job.sent])
        job.rows = [row for row in own if job.sent <= row["time"] < end]
    return jobs


def trained_seconds(rows: list[dict[str, Any]]) -> float:
    """Of a stage, as its last row of steps says; an event's seconds are its own."""
    return next((row["seconds"] for row in reversed(rows) if "seconds" in row and "event" not in row), 0.0)


def ask(job: str) -> dict[str, str]:
    """What the controller knows of a job; it forgets what ended some minutes ago."""
    done = subprocess.run(["scontrol", "show", "job", "-o", job], capture_output=True, text=True)
    return dict(re.findall(r"(\S+?)=(\S*)", done.stdout)) if done.returncode == 0 else {}


def state(record: dict[str, str]) -> str:
    """In a word or two: why it waits, or what it ended with."""
    word, reason = record.get("JobState", "gone"), record.get("Reason", "None")
    return f"{word} ({reason})" if word == "PENDING" and reason != "None" else word


if __name__ == "__main__":
    sys.exit(main())
