"""The W&B workspace of a run or of a project: curves, pictures and tables in the order people ask for them.

python tools/dashboard.py RUN_OR_PROJECT [--out FILE] [--entity NAME] [--push]

It is written as JSON, without a network; --push saves it on the server, in the place of the one pushed before.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

import yaml

from sdtrain.errors import ConfigError, RunError
from sdtrain.tracker.dashboard import push, workspace


def main(argv: list[str] | None = None) -> int:
    """Write the workspace and print its path; with --push, save it and print its name."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run_or_project", metavar="RUN_OR_PROJECT", help="a run's output_dir, or a project of W&B")
    parser.add_argument("--out", metavar="FILE", type=Path, help="default: RUN/dashboard.json, or ./dashboard.json")
    parser.add_argument("--entity", metavar="NAME", default="", help="whose project it is; default: the key's owner's")
    parser.add_argument("--push", action="store_true", help="save it on the server")
    args = parser.parse_args(argv)
    try:
        project, group, folder = place_of(args.run_or_project)
        view, out = workspace(project, group, args.entity), args.out or folder / "dashboard.json"
        write(out, view)
        print(out)
        if args.push:
            print(push(view))
    except (ConfigError, RunError) as error:
        print(error, file=sys.stderr)
        return error.exit_code
    return 0


def place_of(run_or_project: str) -> tuple[str, str, Path]:
    """The project, the group (a run's name, or none) and the folder.

    Raises:
        ConfigError: for a path without a run.
    """
    directory = Path(run_or_project).expanduser()
    if not (directory / "config.yaml").is_file():
        if "/" in run_or_project:
            raise ConfigError(f"dashboard: there is no run at {run_or_project}, and a project's name has no slash")
        return run_or_project, "", Path()
    try:
        config = yaml.safe_load((directory / "config.yaml").read_text())
        return config["tracker"].get("project", "sdtrain"), config["name"], directory
    except (OSError, yaml.YAMLError, KeyError, TypeError, AttributeError):
        raise ConfigError(f"dashboard: {directory / 'config.yaml'} is not a run's") from None


def write(path: Path, view: dict[str, object]) -> None:
    """Raises ConfigError where it cannot."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(view, indent=1) + "\n")
    except OSError as error:
        raise ConfigError(f"dashboard: cannot write {path}: {error.strerror}") from error


if __name__ == "__main__":
    sys.exit(main())
