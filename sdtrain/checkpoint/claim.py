"""One run directory, one run at a time: two would prune and rename each other's checkpoints."""

from __future__ import annotations

import fcntl
import os
import socket
import time
from pathlib import Path
from typing import TextIO

from sdtrain.errors import ConfigError

_TAKEN = (BlockingIOError, PermissionError)  # as POSIX lets a system choose
_SAME_HOST_SECONDS, _OTHER_HOST_SECONDS = 5.0, 120.0  # until a dead one's memory, or its lease, is given back


def claim(directory: Path) -> TextIO | None:
    """Holds `directory` for this process until what it returns is closed, or the process ends, however it does.

    A record lock: workers that are forked have no part in it, and network file systems know it. None where the file
    system has no locks; a job's own queue is then all there is (slurm/submit.py asks it). None, too, where an earlier
    attempt of this Slurm job still holds it: Slurm has ended that, but of a node that died some network file systems
    keep the locks until it is up again.

    Raises:
        ConfigError: where another process trains there.
    """
    file, began = (directory / "lock").open("a+"), time.monotonic()
    while True:
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except _TAKEN as error:
            file.seek(0)
            holder = file.read().strip() or "another process"
            place, _, attempt = holder.partition(" in job ")
            is_here = place.endswith(f" on {socket.gethostname()}")
            is_ours = attempt.split(",")[0] == os.environ.get("SLURM_JOB_ID") and attempt != _attempt()
            if time.monotonic() - began > (_SAME_HOST_SECONDS if is_here or is_ours else _OTHER_HOST_SECONDS):
                file.close()
                if is_ours:
                    return None
                raise ConfigError(
                    f"output_dir={directory} is being trained by {holder}; stop it first, or choose another output_dir"
                    + ("" if is_here else f"; if that machine is dead, delete {directory / 'lock'}")
                ) from error
            time.sleep(0.1)
        except OSError:
            file.close()
            return None
        else:
            file.truncate(0)
            job = f" in job {attempt}" if (attempt := _attempt()) else ""
            file.write(f"process {os.getpid()} on {socket.gethostname()}{job}")
            file.flush()
            return file


def _attempt() -> str:
    """Of which Slurm job this is, and how often that has been requeued."""
    job = os.environ.get("SLURM_JOB_ID")
    return f"{job}, attempt {os.environ.get('SLURM_RESTART_COUNT', '0')}" if job else ""
