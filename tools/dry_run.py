"""What a run would take, without its memory, data or pretrained files: parameters, FLOPs, memory, cards, hours.

python tools/dry_run.py +experiment=sd15_512 [key=value ...]
"""

from __future__ import annotations

import argparse
import sys

from sdtrain.errors import ConfigError


def main(argv: list[str] | None = None) -> int:
    """Takes what `python -m sdtrain` takes, and prints the estimate of each stage."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("overrides", metavar="KEY=VALUE", nargs="*", help="as for python -m sdtrain")
    args = parser.parse_args(argv)

    from sdtrain.dry_run.estimate import load  # what is heavy comes after what can be told at once
    from sdtrain.dry_run.report import describe

    try:
        for line in describe(load(args.overrides)):
            print(line, flush=True)
    except ConfigError as error:
        print(error, file=sys.stderr)
        return error.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main())
