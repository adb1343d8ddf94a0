"""What a run would take, without its memory, data or pretrained files: parameters, FLOPs, memory, disk, hours.

python tools/plan.py +experiment=sd15_512 num_nodes=8 devices=8 [--mfu 0.4] [key=value ...]
"""

from __future__ import annotations

import argparse
import sys

from sdtrain.errors import ConfigError


def main(argv: list[str] | None = None) -> int:
    """Takes what `python -m sdtrain` takes, and prints the estimate of each stage."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("overrides", metavar="KEY=VALUE", nargs="*", help="as for python -m sdtrain")
    parser.add_argument("--mfu", type=float, default=0.4, help="the share of a card's peak that training reaches")
    args = parser.parse_intermixed_args(argv)

    from rich.console import Console  # what is heavy comes after what can be told at once

    from sdtrain.plan.estimate import load
    from sdtrain.plan.report import describe

    console = Console(width=None if sys.stdout.isatty() else 160, highlight=False)
    try:
        if not 0 < args.mfu <= 1:
            raise ConfigError(f"--mfu {args.mfu} must be above 0, and 1 at most")
        for line in describe(load(args.overrides), args.mfu):
            console.print(line, markup=False, soft_wrap=isinstance(line, str))
    except ConfigError as error:
        print(error, file=sys.stderr)
        return error.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main())
