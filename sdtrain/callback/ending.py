"""How a run ends: what DIR/exit.json says under any launcher, and what the ranks tell each other on the way out.

A rank that fails alone says so in a file of its own, since the others may hang in a collective without it. Once the
first rank has written DIR/exit.json it holds the run's exit code: the others then leave with 0, or a launcher would
kill the first one before it could.
"""

from __future__ import annotations

import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from lightning.pytorch.plugins.environments import SLURMEnvironment, TorchElasticEnvironment

from sdtrain.checkpoint.disk import told_of_disk
from sdtrain.errors import ConfigError, RunError

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)
# Why a run was told to stop. Where ranks heard different things the last in this list counts.
REASONS = ("", "SIGINT", "the STOP file", "SIGTERM", "the time limit", "SIGUSR1")
_COMES_BACK = ("the time limit", "SIGUSR1")
GRACE_SECONDS = 4.0  # Lightning looks after its children every 5


class _Stopped(BaseException):
    """Of a signal outside of a fit; no `except Exception` on its way, as around an import, takes it for its own."""


launchers: list[Any] = []  # Lightning's, of this process's trainers; the first one starts the other ranks


def launched_by_slurm() -> bool:
    """Whether Lightning takes this process for a task of `srun`; torchrun inside of Slurm has ranks of its own."""
    return SLURMEnvironment.detect() and not TorchElasticEnvironment.detect()


def global_rank() -> int:
    """This process's rank as its launcher says it; of more than one node under Lightning's own, not 0 is all that is
    certain.
    """
    if TorchElasticEnvironment.detect():
        return int(os.environ["RANK"])
    if launched_by_slurm():
        return int(os.environ["SLURM_PROCID"])
    return int(os.environ.get("LOCAL_RANK", 0)) + 1000 * int(os.environ.get("NODE_RANK", 0))


def is_launched_by_lightning() -> bool:
    """Whether the first rank started this one, and is its parent."""
    is_other = TorchElasticEnvironment.detect() or launched_by_slurm()
    return not is_other and int(os.environ.get("LOCAL_RANK", 0)) > 0


def forget(directory: Path) -> None:
    """Removes what an attempt before this one left. The first rank's, before the others can need it."""
    for path in (*directory.glob("exit*.json"), directory / "REQUEUE", directory / "STOPPED"):
        path.unlink(missing_ok=True)
    shutil.rmtree(directory / "heartbeat", ignore_errors=True)


def tell(directory: Path, exit_code: int, reason: str, rank: int = 0) -> None:
    """The first rank's word is the run's; another rank's says that it ends alone."""
    path = directory / (f"exit_rank{rank}.json" if rank else "exit.json")
    with suppress(OSError):  # on a full disk the process's own code and words are what is left
        write_json(path, {"exit_code": exit_code, "reason": reason})


def told(directory: Path) -> RunError | None:
    """What the first rank said."""
    said = read_json(directory / "exit.json")
    return None if said is None else RunError(said["reason"], said["exit_code"])


def told_by_another(directory: Path) -> RunError | None:
    """The end of a rank that failed alone."""
    for path in sorted(directory.glob("exit_rank*.json")):
        said = read_json(path)
        if said is not None:
            rank = path.stem.removeprefix("exit_rank")
            return RunError(f"rank {rank}: {said['reason']}", said["exit_code"])
    return None


def wait_until(is_so: Any, seconds: float) -> bool:  # noqa: ANN401 a function without arguments
    """Whether it becomes so in time."""
    until = time.monotonic() + seconds
    while not is_so():
        if time.monotonic() > until:
            return False
        time.sleep(0.05)
    return True


def outlive_children(seconds: float) -> None:
    """Waits so long for the ranks that this process launched, and kills what does not leave."""
    children: list[subprocess.Popen] = [p for launcher in launchers for p in getattr(launcher, "procs", [])]
    wait_until(lambda: all(child.poll() is not None for child in children), seconds)
    for child in children:
        with suppress(OSError):
            child.kill()  # also one that is stopped
            child.wait()


def next_command() -> str:
    """What continues this run: what started it, without what would start it anew; of a job, what sent it."""
    if any(argument.startswith("cluster.submitted=") for argument in sys.orig_argv):
        return "slurm/submit.py as it was sent, unless Slurm requeues the job"
    return shlex.join(argument for argument in sys.orig_argv if argument.lstrip("+") != "resume=never")


def leave_marker(directory: Path, reason: str) -> None:
    """Tells a Slurm batch script whether to ask for the job again (slurm/job.sh)."""
    if "SLURM_JOB_ID" in os.environ:
        (directory / ("REQUEUE" if reason in _COMES_BACK else "STOPPED")).touch()


@contextmanager
def recorded(directory: Path, rank: int, finish: Callable[[], None]) -> Iterator[None]:
    """DIR/exit.json says how what is inside ended. The first rank comes out last; it calls `finish` where that was bad.

    Raises:
        SystemExit: 0, in another rank, once the first one holds the code.
        RunError: in the first rank, where another one failed alone.
    """
    with leaving_at_once(directory):
        failure: BaseException | None = None
        try:
            yield
        except _Stopped as stop:
            failure = RunError(str(stop), 75)
        except BaseException as error:  # noqa: BLE001 it is raised again below
            failure = told_of_disk(error, directory)
        let_finish()
        if rank == 0:
            failure = _end_run(directory, failure)
            if failure is not None:
                with suppress(OSError):  # a full disk takes no last row either, and the failure is what is told
                    finish()
        elif failure is not None:
            failure = _end_rank(directory, rank, failure)
        if num_ranks() > 1 and not _is_crash(failure):
            torch.distributed.destroy_process_group()
        if rank == 0:
            outlive_children(GRACE_SECONDS if _is_crash(failure) else 3 * GRACE_SECONDS)
    if failure is not None:
        raise failure


def _end_run(directory: Path, failure: BaseException | None) -> BaseException | None:
    tell(directory, *outcome(failure))
    if _is_peer_lost(failure):
        wait_until(lambda: told_by_another(directory), GRACE_SECONDS)
        failure = told_by_another(directory) or failure
        tell(directory, *outcome(failure))
    return failure


def _end_rank(directory: Path, rank: int, failure: BaseException) -> BaseException:
    code, reason = outcome(failure)
    if _is_crash(failure):
        file = directory / "logs" / f"rank{rank}.traceback.txt"
        file.parent.mkdir(exist_ok=True)
        file.write_text("".join(traceback.format_exception(failure)))
        reason = f"{reason}; its traceback is in {file}"
    if not _is_peer_lost(failure):
        tell(directory, code, reason, rank)
    if wait_until(lambda: told(directory), 2 * GRACE_SECONDS):
        return SystemExit(0)
    tell(directory, code, f"rank {rank}: {reason}")
    return failure


def outcome(failure: BaseException | None) -> tuple[int, str]:
    """The exit code and the reason of an end."""
    if failure is None:
        return 0, "done"
    if isinstance(failure, KeyboardInterrupt):
        return 75, "Ctrl-C"
    first_line = (str(failure).splitlines() or [""])[0]
    if isinstance(failure, ConfigError | RunError):
        return failure.exit_code, first_line
    return 1, f"crashed: {type(failure).__name__}: {first_line}"


def _is_crash(failure: BaseException | None) -> bool:
    """An end that was not chosen: the other ranks may know nothing of it."""
    return not (failure is None or isinstance(failure, ConfigError | RunError | KeyboardInterrupt | SystemExit))


def _is_peer_lost(failure: BaseException | None) -> bool:
    """A collective that failed since another rank is gone, which is not the cause of anything."""
    is_network = isinstance(failure, torch.distributed.DistError) or "gloo" in str(failure)
    return _is_crash(failure) and isinstance(failure, RuntimeError) and is_network


def num_ranks() -> int:
    """How many processes train together, as far as they have met."""
    is_met = torch.distributed.is_available() and torch.distributed.is_initialized()
    return torch.distributed.get_world_size() if is_met else 1


def let_finish() -> None:
    """A run that ends is not interrupted by being told again to stop; Ctrl-C still works."""
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGINT, signal.default_int_handler)
        for number in (signal.SIGTERM, signal.SIGUSR1):
            signal.signal(number, signal.SIG_IGN)


@contextmanager
def leaving_at_once(directory: Path) -> Iterator[None]:
    """Inside it, outside of a fit, there is nothing to save: a stop signal ends the run where it stands, with 75."""
    own = os.getpid()

    def leave(number: int, frame: FrameType | None) -> None:  # noqa: ARG001 the signature of a handler
        if os.getpid() != own:  # a worker that was forked just now
            return
        let_finish()
        reason = signal.Signals(number).name
        if global_rank() == 0:
            leave_marker(directory, reason)
        raise _Stopped(f"stopped by {reason} between two steps; continue with: {next_command()}")

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.signal(number, leave) for number in SIGNALS}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """In one piece: others read it while it is written."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    try:
        part.write_text(json.dumps(content))
        part.replace(path)
    except OSError:
        with suppress(OSError):
            part.unlink()
        raise


def read_json(path: Path) -> dict[str, Any] | None:
    """None where it is not there."""
    with suppress(OSError, ValueError):
        return json.loads(path.read_text())
    return None
