"""Draw pictures from captions with a finished run.

python tools/sample.py RUN "a caption" "another" [--negative TEXT] [--guidance 3] [--steps 20] [--seed 1] [--sampler
ddim]
"""

from __future__ import annotations

import argparse
import re
import sys
from pathlib import Path

from sdtrain.errors import ConfigError

COLUMNS = 4


def main(argv: list[str] | None = None) -> int:
    """One PNG a caption and all of them in grid.png, whose paths are printed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", metavar="RUN", type=Path, help="the output_dir of a run")
    parser.add_argument("captions", metavar="CAPTION", nargs="*", help="one picture each")
    parser.add_argument("--prompts-file", metavar="FILE", type=Path, help="more captions, one a line")
    parser.add_argument("--out", metavar="DIR", type=Path, help="default: RUN/generated")
    parser.add_argument("--negative", metavar="TEXT", help="what to move away from")
    parser.add_argument("--guidance", metavar="SCALE", type=float, help="1 is none; default: the run's")
    parser.add_argument("--steps", metavar="N", type=int, help="of the sampler; default: the run's")
    parser.add_argument("--size", metavar="PIXELS", help="a side, or WIDTHxHEIGHT; default: as trained")
    parser.add_argument("--seed", metavar="N", type=int, default=0, help="default: %(default)s")
    parser.add_argument("--sampler", metavar="NAME", help="one of configs/sampler/; default: the run's")
    which = parser.add_mutually_exclusive_group()
    which.add_argument("--raw", action="store_true", help="the raw weights instead of their average")
    which.add_argument("--averages", metavar="FILE", type=Path, help="of another length, as tools/ema.py makes them")
    args = parser.parse_args(argv)
    try:
        for path in sample(args):
            print(path)
    except ConfigError as error:
        print(error, file=sys.stderr)
        return error.exit_code
    return 0


def sample(args: argparse.Namespace) -> list[Path]:
    """The files that were written. Raises ConfigError for what cannot be read, drawn or written."""
    captions = [*args.captions, *(read_prompts(args.prompts_file) if args.prompts_file else ())]
    if not captions:
        raise ConfigError("give at least one caption, or --prompts-file FILE with one a line")
    size = parse_size(args.size)

    import numpy as np  # what is heavy comes after what can be told at once

    from sdtrain.callback.grid import draw_grid
    from sdtrain.contracts import Preview
    from sdtrain.interop.pipeline import Pipeline

    pipe = Pipeline.load(args.run, "raw" if args.raw else args.averages or "ema")
    pictures = pipe(captions, args.negative, args.guidance, args.steps, size, args.seed, args.sampler)
    out = args.out or args.run / "generated"
    paths = [out / f"{i:04d}_{file_name(caption)}_seed{args.seed}.png" for i, caption in enumerate(captions)]
    grid = draw_grid(Preview(np.stack([np.asarray(picture) for picture in pictures]), captions, COLUMNS))
    try:
        out.mkdir(parents=True, exist_ok=True)
        for picture, path in zip([*pictures, grid], [*paths, out / "grid.png"], strict=True):
            picture.save(path)
    except OSError as error:
        raise ConfigError(f"--out: cannot write to {out}: {error.strerror or error}") from error
    return [*paths, out / "grid.png"]


def read_prompts(file: Path) -> list[str]:
    """The lines that are not empty."""
    try:
        return [line.strip() for line in file.read_text(encoding="utf-8-sig").splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or error
        raise ConfigError(f"--prompts-file: {file} cannot be read: {reason}") from error


def parse_size(text: str | None) -> int | tuple[int, int] | None:
    """`64` or `96x64`, width first."""
    if text is None:
        return None
    found = re.fullmatch(r"(\d+)(?:x(\d+))?", text)
    if not found:
        raise ConfigError(f"--size: {text!r} is neither PIXELS nor WIDTHxHEIGHT")
    return (int(found[1]), int(found[2])) if found[2] else int(found[1])


def file_name(caption: str) -> str:
    """What is left of a caption in letters that every file system takes."""
    return re.sub(r"[^a-z0-9]+", "-", caption.lower())[:60].strip("-") or "picture"


if __name__ == "__main__":
    sys.exit(main())
