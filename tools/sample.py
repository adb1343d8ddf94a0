"""Draw pictures with a finished run, from captions or whatever else its model reads.

python tools/sample.py RUN "a caption" "another" [--negative TEXT] [--guidance 3] [--steps 20] [--seed 1] [--sampler
ddim]
python tools/sample.py RUN --label 3 --label 5                       classes
python tools/sample.py RUN --num 4                                   no condition
python tools/sample.py RUN "a caption" --image x.png --mask m.png    inpainting: white is painted
python tools/sample.py RUN "a caption" --image small.png             upscaling [--noise-level 20]
python tools/sample.py RUN "an instruction" --source x.png           editing [--image-guidance 1.5]
python tools/sample.py RUN "a caption" --original-size 64x64         SDXL's sizes
"""

from __future__ import annotations

import argparse
import os
import re
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from sdtrain.errors import ConfigError

COLUMNS = 4
TOLD = ("label", "image", "mask", "source", "original_size", "crop_top_left", "target_size", "noise_level")


def main(argv: list[str] | None = None) -> int:
    """One PNG a picture and all of them in grid.png, whose paths are printed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", metavar="RUN", type=Path, help="the output_dir of a run")
    parser.add_argument("captions", metavar="CAPTION", nargs="*", help="one picture each")
    parser.add_argument("--prompts-file", metavar="FILE", type=Path, help="more captions, one a line")
    for name, metavar, text in (
        ("--label", "CLASS", "its number or name; this and the next six may come again, for one picture each"),
        ("--image", "FILE", "the picture to paint into, or to enlarge"),
        ("--mask", "FILE", "where to paint: what is white"),
        ("--source", "FILE", "the picture to edit"),
        ("--original-size", "WIDTHxHEIGHT", "what the model takes for the size before any crop"),
        ("--crop-top-left", "TOPxLEFT", "what it takes for the crop's place"),
        ("--target-size", "WIDTHxHEIGHT", "what it takes for the size"),
    ):
        parser.add_argument(name, metavar=metavar, action="append", help=text)
    parser.add_argument("--noise-level", metavar="N", type=int, action="append", help="on the picture to enlarge")
    parser.add_argument("--num", metavar="N", type=int, help="pictures; default: as many as are told apart")
    parser.add_argument("--out", metavar="DIR", type=Path, help="default: RUN/generated")
    parser.add_argument("--negative", metavar="TEXT", help="what to move away from")
    parser.add_argument("--guidance", metavar="SCALE", type=float, help="1 is none; default: the run's")
    parser.add_argument("--image-guidance", metavar="SCALE", type=float, help="of the picture to edit alone")
    parser.add_argument("--steps", metavar="N", type=int, help="of the sampler; default: the run's")
    parser.add_argument("--size", metavar="PIXELS", help="a side, or WIDTHxHEIGHT; default: as trained")
    parser.add_argument("--seed", metavar="N", type=int, default=0, help="default: %(default)s")
    parser.add_argument("--sampler", metavar="NAME", help="one of configs/sampler/; default: the run's")
    which = parser.add_mutually_exclusive_group()
    which.add_argument("--raw", action="store_true", help="the raw weights instead of their average")
    which.add_argument("--averages", metavar="FILE", type=Path, help="of another length, as tools/ema.py makes them")
    args = parser.parse_intermixed_args(argv)  # captions may follow options
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
    told = {name: getattr(args, name) for name in TOLD if getattr(args, name)}
    told |= {name: [parse_size(text, name) for text in told[name]] for name in TOLD[4:7] if name in told}
    size, out = parse_size(args.size, "size"), args.out or args.run / "generated"
    require_writable(out)

    import numpy as np  # what is heavy comes after what can be told at once

    from sdtrain.callback.grid import draw_grid
    from sdtrain.contracts import Preview
    from sdtrain.interop.pipeline import Pipeline

    pipe = Pipeline.load(args.run, "raw" if args.raw else args.averages or "ema")
    options = (args.negative, args.guidance, args.steps, size, args.seed, args.sampler, args.num, args.image_guidance)
    pictures = pipe(captions or None, *options, **told)
    titles = [title(captions, told, i) for i in range(len(pictures))]
    paths = [out / f"{i:04d}_{file_name(text)}_seed{args.seed}.png" for i, text in enumerate(titles)]
    grid = draw_grid(Preview(np.stack([np.asarray(picture) for picture in pictures]), titles, COLUMNS))
    try:
        out.mkdir(parents=True, exist_ok=True)
        for picture, path in zip([*pictures, grid], [*paths, out / "grid.png"], strict=True):
            picture.save(path)
    except OSError as error:
        raise ConfigError(f"--out: cannot write to {out}: {error.strerror or error}") from error
    return [*paths, out / "grid.png"]


def require_writable(out: Path) -> None:
    """Before anything is drawn.

    Raises:
        ConfigError: where the folder cannot be made or written.
    """
    existing = next(place for place in (out.absolute(), *out.absolute().parents) if place.exists())
    if not existing.is_dir() or not os.access(existing, os.W_OK | os.X_OK):
        raise ConfigError(f"--out: cannot write to {out}; choose another folder with --out DIR")


def title(captions: Sequence[str], told: Mapping[str, Sequence[str]], i: int) -> str:
    """What picture i is of."""
    if captions:
        return captions[i % len(captions)]
    if "label" in told:
        return f"label {told['label'][i % len(told['label'])]}"
    return next((Path(told[name][i % len(told[name])]).stem for name in ("image", "source") if name in told), "")


def read_prompts(file: Path) -> list[str]:
    """The lines that are not empty."""
    try:
        return [line.strip() for line in file.read_text(encoding="utf-8-sig").splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or error
        raise ConfigError(f"--prompts-file: {file} cannot be read: {reason}") from error


def parse_size(text: str | None, option: str) -> int | tuple[int, int] | None:
    """`64` or `96x64`, width first."""
    if text is None:
        return None
    found = re.fullmatch(r"(\d+)(?:x(\d+))?", text)
    if not found:
        raise ConfigError(f"--{option.replace('_', '-')}: {text!r} is neither PIXELS nor PIXELSxPIXELS")
    return (int(found[1]), int(found[2])) if found[2] else int(found[1])


def file_name(caption: str) -> str:
    """What is left of a caption in letters that every file system takes."""
    return re.sub(r"[^a-z0-9]+", "-", caption.lower())[:60].strip("-") or "picture"


if __name__ == "__main__":
    sys.exit(main())
