"""Make an average of any length from those that a run kept: power-function averages, after the training.

python tools/ema.py RUN --length 0.08 [--stage diffusion] [--out FILE]

It needs a stage with callback.ema.lengths; the more is kept (callback.ema.snapshot_every_steps), the closer it comes.
"""

from __future__ import annotations

import argparse
import contextlib
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from sdtrain.errors import ConfigError, RunError

if TYPE_CHECKING:
    from torch import Tensor

    from sdtrain.optim.averaging import Snapshot

MOST_MISSED = 0.1


def main(argv: list[str] | None = None) -> int:
    """Writes RUN/STAGE/ema/ema_0.080.safetensors and prints its path, after a line on how close it is."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", metavar="RUN", type=Path, help="the output_dir of a run")
    parser.add_argument("--length", metavar="SHARE", type=float, required=True, help="of training, such as 0.08")
    parser.add_argument(
        "--stage", choices=("autoencoder", "diffusion"), default="diffusion", help="default: %(default)s"
    )
    parser.add_argument("--out", metavar="FILE", type=Path, help="default: RUN/STAGE/ema/ema_LENGTH.safetensors")
    args = parser.parse_args(argv)
    try:
        directory = args.run.expanduser() / args.stage
        made, told = reconstruct(directory, args.length)
        out = args.out or directory / "ema" / f"ema_{args.length:.3f}.safetensors"
        write(made, out)
    except ConfigError as error:
        print(error, file=sys.stderr)
        return error.exit_code
    print(told)
    print(out)
    return 0


class Stored(NamedTuple):
    """A file of averages."""

    path: Path
    snapshot: Snapshot


def reconstruct(directory: Path, length: float) -> tuple[dict[str, Tensor], str]:
    """The averages of a length at the newest step that a stage's directory keeps any of, and a line on how close.

    Raises:
        ConfigError: where nothing is kept, or too little for this length.
    """
    import torch
    from safetensors import safe_open

    from sdtrain.optim.averaging import Snapshot, mix

    stored = list(find(directory))
    if not stored:
        raise ConfigError(f"{directory} keeps no power-function averages: train it with callback.ema.lengths")
    newest = max(one.snapshot.num_updates for one in stored)
    factors, missed = mix([one.snapshot for one in stored], Snapshot(newest, length))
    told = f"length {length:g} at {newest} updates, from {len(stored)} stored averages: {missed:.1%} of it is missed"
    if missed > MOST_MISSED:
        there = ", ".join(f"{value:g}" for value in sorted({one.snapshot.length for one in stored}))
        raise ConfigError(
            f"{told}, more than {MOST_MISSED:.0%}; take a length nearer to {there}, or keep more of them "
            "(callback.ema.snapshot_every_steps)"
        )
    made: dict[str, Tensor] = {}
    for factor, one in zip(factors, stored):
        with safe_open(one.path, "pt") as opened:
            for name in sorted({*opened.keys()} - {"num_updates", "length"}):
                value = opened.get_tensor(name).double() * float(factor)
                made[name] = made[name] + value if name in made else value
    meta = {"num_updates": torch.tensor(newest), "length": torch.tensor(length, dtype=torch.float64)}
    return {name: value.float() for name, value in made.items()} | meta, told


def find(directory: Path) -> Iterator[Stored]:
    """The power-function averages in a stage's snapshots and checkpoints, each time and length once, none damaged."""
    from safetensors import safe_open

    from sdtrain.checkpoint.commit import verify
    from sdtrain.optim.averaging import Snapshot

    seen = set()
    for place in sorted([*directory.glob("ema/step_*"), *directory.glob("checkpoints/step_*")]):
        try:
            verify(place)
        except RunError as error:
            print(f"skipped {place}: {error}", file=sys.stderr)
            continue
        for path in sorted(place.glob("ema*.safetensors")):
            with safe_open(path, "pt") as opened:
                if "length" not in set(opened.keys()):  # an exponential average
                    continue
                snapshot = Snapshot(int(opened.get_tensor("num_updates")), float(opened.get_tensor("length")))
            if snapshot not in seen and snapshot.num_updates > 0:
                seen.add(snapshot)
                yield Stored(path, snapshot)


def write(averages: dict[str, Tensor], out: Path) -> None:
    """All or nothing."""
    from safetensors.torch import save_file

    part = out.with_name(f"{out.name}.tmp")
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        save_file(averages, part)
        part.replace(out)
    except Exception as error:
        with contextlib.suppress(OSError):
            part.unlink()
        raise ConfigError(f"--out: cannot write {out}: {error}") from error


if __name__ == "__main__":
    sys.exit(main())
