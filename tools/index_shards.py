"""Index shards ahead of a run, and say what they hold and what they lost.

    python tools/index_shards.py SHARDS...              local shards: an index beside each
    python tools/index_shards.py SHARDS... --out DIR    one index folder, for data.shards=DIR; shards may be remote
    python tools/index_shards.py --verify DIR           the folder against its shards, byte by byte

SHARDS are .tar files, globs in quotes, folders, and http(s):// and s3:// addresses with {00000..00123} for numbers and,
in S3, with *. What is finished is kept: start it again after a stop and it goes on.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from sdtrain.data.address import is_remote
from sdtrain.data.index import build_index, find_shards
from sdtrain.data.indexing import index_all
from sdtrain.data.manifest import REJECTED, is_index_folder, merge_losses, write_folder
from sdtrain.data.shard_index import index_shard
from sdtrain.data.shard_walk import Loss
from sdtrain.data.verify import verify_folder
from sdtrain.errors import ConfigError

PARTS = "parts"  # in the index folder: the indexes of shards that cannot have theirs beside them


def main(argv: list[str] | None = None) -> int:
    """0 where all shards were read, 1 where some could not be or disagree, 2 where the arguments are wrong."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("shards", metavar="SHARDS", nargs="*", help="see above")
    parser.add_argument("--out", metavar="DIR", type=Path, help="the index folder; made if absent")
    parser.add_argument("--root", help="the shards' folder or address as the run will see it, if not as it is here")
    parser.add_argument("--workers", metavar="N", type=int, default=os.cpu_count(), help="shards at once, %(default)s")
    parser.add_argument("--deep", action="store_true", help="decode every picture, and leave out what cannot be")
    parser.add_argument("--verify", metavar="DIR", type=Path, help="an index folder to check")
    args = parser.parse_args(argv)
    if bool(args.shards) == bool(args.verify) or args.workers < 1 or (args.root and not args.out):
        parser.error("give SHARDS, or --verify DIR; --root goes with --out, and --workers is 1 or more")
    try:
        return verify(args.verify, args.workers) if args.verify else index(args)
    except (ConfigError, OSError) as error:
        print(error, file=sys.stderr)
        return 2


def index(args: argparse.Namespace) -> int:
    """Index what has no index yet, put it together if asked to, and tell."""
    addresses = find_shards(args.shards, "SHARDS")
    for address in addresses:
        if not is_remote(address) and is_index_folder(address):
            raise ConfigError(f"{address} is an index already; give the shards")
    if args.out is None and any(map(is_remote, addresses)):
        raise ConfigError("nothing can be kept beside remote shards; give --out DIR")
    parts = None
    if args.out is not None:
        parts = args.out / PARTS
        parts.mkdir(parents=True, exist_ok=True)
    with progress(len(addresses), "indexing") as advance:
        failures = index_all(addresses, parts, args.workers, args.deep, lambda *_: advance())
    for failure in failures.values():
        print(failure, file=sys.stderr)
    if failures:
        print(f"{len(failures)} of {len(addresses)} shards could not be indexed; start again to go on", file=sys.stderr)
        return 1
    if args.out is not None:
        about = write_folder(args.out, addresses, lambda address: index_shard(address, parts), args.root)
        losses, shards = [Loss(*loss) for loss in about["losses"]], about["shards"]
        num_samples, fingerprint = about["num_samples"], about["fingerprint"]
        num_bytes = sum(shard["num_bytes"] for shard in shards)
    else:
        whole = build_index(addresses)
        losses, shards = merge_losses(whole.losses), whole.shards
        num_samples, fingerprint = len(whole), whole.fingerprint
        num_bytes = sum(shard.num_bytes for shard in shards)
    tell(losses, len(addresses) - len(shards), num_bytes)
    print(f"{num_samples} samples in {len(shards)} shards, fingerprint {fingerprint}")
    if args.out is not None:
        print(f"what was left out, one by one: {args.out / REJECTED}\nnext: data.shards={args.out}")
    return 0


def verify(folder: Path, num_workers: int) -> int:
    """Print what does not agree."""
    from sdtrain.data.manifest import open_folder

    num_shards = len(open_folder(folder, refuses_changed=False).records)
    with progress(num_shards, "verifying") as advance:
        faults = verify_folder(folder, num_workers, advance)
    for fault in faults:
        print(fault, file=sys.stderr)
    print(f"{num_shards - len(faults)} of {num_shards} shards are what was indexed")
    return 1 if faults else 0


def tell(losses: list[Loss], num_left_out: int, num_bytes: int) -> None:
    """One table: what is no sample of the index, by reason."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(
        "what", "count", "where", "note", title=f"{num_bytes / 1e9:.2f} GB read; not in the index", expand=True
    )
    for loss in sorted(losses, key=lambda loss: -loss.count):
        style = "bold red" if loss.reason in ("forbidden_suffix", "missing_sample") else ""
        table.add_row(Text(loss.reason, style), str(loss.count), Text(loss.shard), Text(loss.note))
    if num_left_out:
        table.add_row(Text("shards left out", "bold red"), str(num_left_out), "", f"see {REJECTED}")
    if table.row_count:
        Console().print(table)


@contextmanager
def progress(num_shards: int, verb: str) -> Iterator[object]:
    """A bar on standard error; yields what moves it on by a shard."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn(verb), BarColumn(), MofNCompleteColumn(), TextColumn("shards"), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task(verb, total=num_shards)
        yield lambda: bar.advance(task)


if __name__ == "__main__":
    sys.exit(main())
