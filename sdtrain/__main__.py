"""`python -m sdtrain`: checks what was asked in under a second, then hands over to Hydra and `run`."""

# ruff: noqa: E402 a signal may come while the rest is imported

from __future__ import annotations

import fcntl
import json
import os
import shlex
import signal
import sys
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from types import FrameType
from typing import Any, NoReturn

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)
_PARENT = os.getppid()
_directory: list[Path] = []  # once it is known where the run goes, and until the run itself answers signals


def stop_at_once(number: int, frame: FrameType | None) -> None:  # noqa: ARG001 the signature of a handler
    """Of a run that has not begun there is nothing to save: the process ends with 75.

    It does not raise, since what is being imported may swallow that, or print it. exit.json says it where the directory
    is there and no other process trains in it. A rank that the first one launched tells that one, and goes on until
    they meet: Lightning would kill it when another rank leaves.
    """
    is_launched = int(os.environ.get("LOCAL_RANK", 0)) and not {"TORCHELASTIC_RUN_ID", "SLURM_PROCID"} & {*os.environ}
    if is_launched and os.getppid() == _PARENT:
        os.kill(_PARENT, signal.SIGTERM)
        return
    name = signal.Signals(number).name
    reason = f"stopped by {name} before the run began; continue with: {shlex.join(sys.orig_argv)}"
    for directory in _directory:
        with suppress(OSError), (directory / "lock").open("a") as lock:
            fcntl.lockf(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            part = directory / "exit.json.tmp"
            part.write_text(json.dumps({"exit_code": 75, "reason": reason}))
            part.replace(directory / "exit.json")
    os.write(2, f"error: {reason}\n".encode())  # not print: a handler may interrupt one
    os._exit(75)


if __name__ == "__main__" or Path(sys.argv[0]).name == "sdtrain":  # the console script
    for each in SIGNALS:
        signal.signal(each, stop_at_once)

import hydra
from hydra._internal.utils import get_args_parser
from omegaconf import DictConfig

from sdtrain.config import config_directory, load_config, plus
from sdtrain.continuation import check_continuation, check_submitted
from sdtrain.errors import ConfigError, RunError
from sdtrain.sweep import run_jobs


@hydra.main(version_base="1.3", config_path=str(config_directory()), config_name="train")
def main(cfg: DictConfig) -> None:
    """One run. Torch and Lightning are imported here and not before: help and mistakes answer at once."""
    _directory.append(Path(cfg.output_dir).expanduser())
    from sdtrain.run import run

    _directory.clear()
    leave(run, cfg)


def start(arguments: list[str]) -> int:
    """Check the arguments, then run: one job through Hydra, or every job of a sweep."""
    arguments = sys.argv[1:] = [plus(argument) for argument in arguments]
    options, unknown = get_args_parser().parse_known_args(arguments)
    if unknown or options.config_path or options.config_name:
        hint = "; write key=value" if unknown else "; a directory of your own configs is added with --config-dir"
        raise ConfigError(f"the option {(unknown or ['--config-path or --config-name'])[0]} is not known{hint}")
    if options.multirun:
        return run_jobs(options.overrides, options.config_dir)
    if not (options.help or options.hydra_help or options.info or options.shell_completion):
        cfg = load_config(options.overrides, options.config_dir)
        if not options.cfg and cfg.cluster is not None and cfg.cluster.submitted is not None:
            check_submitted(Path(cfg.output_dir), cfg, cfg.cluster.submitted)
        if not options.cfg:
            check_continuation(Path(cfg.output_dir), cfg)
    os.environ["HYDRA_FULL_ERROR"] = "1"  # a bug keeps its whole traceback
    main()
    return 0


def leave(function: Callable[[Any], Any], argument: Any) -> NoReturn:
    """Call, and end the process with 0, an error's own code, or 75 after Ctrl-C; a bug goes on as it is."""
    try:
        code = function(argument)
    except (ConfigError, RunError) as error:
        print(f"error: {error}", file=sys.stderr)
        code = error.exit_code
    except KeyboardInterrupt:
        print("stopped", file=sys.stderr)
        code = 75
    finally:
        for number in SIGNALS:
            if signal.getsignal(number) is stop_at_once:  # the end is told, and stands; Ctrl-C still works
                signal.signal(number, signal.SIG_DFL if number == signal.SIGINT else signal.SIG_IGN)
    sys.exit(code if isinstance(code, int) else 0)


def cli() -> None:
    """The console script's door."""
    leave(start, sys.argv[1:])


if __name__ == "__main__":
    cli()
