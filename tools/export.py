"""Write a finished run as a folder that diffusers loads, and on demand as one safetensors file.

python tools/export.py RUN OUT [--single-file FILE]
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from sdtrain.errors import ConfigError


def main(argv: list[str] | None = None) -> int:
    """Prints what was written, and what its user must know."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", metavar="RUN", type=Path, help="the output_dir of a run")
    parser.add_argument("out", metavar="OUT", type=Path, help="a new folder")
    parser.add_argument("--single-file", metavar="FILE", type=Path, help="a .safetensors file beside it")
    args = parser.parse_args(argv)
    try:
        for line in export(args):
            print(line)
    except ConfigError as error:
        print(error, file=sys.stderr)
        return error.exit_code
    return 0


def export(args: argparse.Namespace) -> list[str]:
    """The lines to print. Raises ConfigError for what cannot be read, expressed or written."""
    if args.single_file is not None and args.single_file.suffix != ".safetensors":
        raise ConfigError(f"--single-file: {args.single_file} must end with .safetensors")

    from sdtrain.interop.export import export  # what is heavy comes after what can be told at once
    from sdtrain.interop.single_file import write_single_file

    notes = export(args.run, args.out)
    lines = [str(args.out), *(f"note: {note}" for note in notes)]
    if args.single_file is not None:
        note = write_single_file(args.out, args.single_file, args.run.resolve().name)
        lines += [str(args.single_file), *([f"note: {note}"] if note else [])]
    return lines


if __name__ == "__main__":
    sys.exit(main())
