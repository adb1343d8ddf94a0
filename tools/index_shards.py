"""Index shards ahead of a run, and say what they hold and what they lost.

python tools/index_shards.py SHARDS...
"""

from __future__ import annotations

import argparse
import sys

from sdtrain.data.index import build_index, find_shards
from sdtrain.errors import ConfigError


def main(argv: list[str] | None = None) -> int:
    """Build `<shard>.index.npz` beside every shard."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("shards", metavar="SHARDS", nargs="+", help=".tar files, globs in quotes, or folders of shards")
    args = parser.parse_args(argv)
    try:
        index = build_index(find_shards(args.shards, "SHARDS"))
    except ConfigError as error:
        print(error, file=sys.stderr)
        return error.exit_code
    for loss in index.losses:
        print(f"{loss.shard}: {loss.reason} {loss.count} ({loss.note})")
    print(f"{len(index)} samples in {len(index.shards)} shards, fingerprint {index.fingerprint}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
