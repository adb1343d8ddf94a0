"""`-m`: every combination of the listed values as a job of its own, one after another, each in its own directory."""

from __future__ import annotations

import hashlib
import re
import signal
import subprocess
import sys
from pathlib import Path
from types import FrameType

from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from hydra.core.override_parser.overrides_parser import OverridesParser

from sdtrain.config import check_overrides, load_config

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)
PREEMPTED = 75


def jobs(overrides: list[str], extra_directory: str | None = None) -> list[list[str]]:
    """The overrides of every job, all checked, with an `output_dir` named by what the job changes."""
    check_overrides(overrides)
    parsed = OverridesParser.create().parse_overrides(overrides)
    swept = {override.get_key_element() for override in parsed if override.is_sweep_override()}
    result = []
    for job in BasicSweeper.split_arguments(parsed, max_batch_size=None)[0]:
        base = load_config(job, extra_directory).output_dir
        changes = [change.lstrip("+") for change in job if change.partition("=")[0] in swept]
        name = re.sub(r"[^\w=.,@+-]+", "_", ",".join(changes)) or "job"
        if len(name) > 200:  # a file name ends at 255 bytes
            name = f"{name[:180]}-{hashlib.sha256(name.encode()).hexdigest()[:12]}"
        if "output_dir" not in swept:
            job = [*job, "output_dir='{}'".format(str(Path(base, name)).replace("'", r"\'"))]
        result.append(job)
    return result


def run_jobs(overrides: list[str], extra_directory: str | None = None) -> int:
    """Run the jobs in turn, each in a process of its own; the first code that is not 0 is the sweep's."""
    todo, code, caught = jobs(overrides, extra_directory), 0, []
    options = ["--config-dir", extra_directory] if extra_directory else []
    for number, job in enumerate(todo, start=1):
        print(f"job {number} of {len(todo)}: {' '.join(job)}", flush=True)
        # A session of its own, so that a Ctrl-C reaches the job once, from here, and the sweep outlives it.
        process = subprocess.Popen([sys.executable, "-m", "sdtrain", *options, *job], start_new_session=True)

        def forward(number: int, _: FrameType | None, process: subprocess.Popen[bytes] = process) -> None:
            caught.append(number)
            process.send_signal(number)

        previous = [signal.signal(number, forward) for number in SIGNALS]
        job_code = process.wait()
        for number, handler in zip(SIGNALS, previous, strict=True):
            signal.signal(number, handler)
        code = code or (job_code if job_code >= 0 else 128 - job_code)
        if caught or job_code == PREEMPTED:
            return code or PREEMPTED
    return code
