"""`python -m sdtrain`: checks what was asked in under a second, then hands over to Hydra and `run`."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

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
    from sdtrain.run import run

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
    sys.exit(code if isinstance(code, int) else 0)


def cli() -> None:
    """The console script's door."""
    leave(start, sys.argv[1:])


if __name__ == "__main__":
    cli()
