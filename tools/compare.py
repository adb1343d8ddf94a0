"""Put several runs beside each other in one HTML page.

python tools/compare.py RUN RUN... [--out compare.html]
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from sdtrain.errors import ConfigError
from sdtrain.tracker.compare import write_comparison


def main(argv: list[str] | None = None) -> int:
    """Write the page and print its path."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", metavar="RUN", type=Path, nargs="+", help="the output_dir of a run, finished or not")
    parser.add_argument("--out", metavar="FILE", type=Path, default=Path("compare.html"), help="default: %(default)s")
    args = parser.parse_args(argv)
    try:
        print(write_comparison(args.runs, args.out))
    except ConfigError as error:
        print(error, file=sys.stderr)
        return error.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main())
