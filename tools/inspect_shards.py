"""What is in some shards: counts, sizes, shapes, captions, repeats, what was left out; and a sheet of samples.

python tools/inspect_shards.py SHARDS... [--sheet OUT.png] [--filter "aesthetic >= 5"] [--latents RUN]
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from sdtrain.data import inspection
from sdtrain.data.bad_sample import BadSample
from sdtrain.data.caption import clean_caption
from sdtrain.data.decode import decode_image
from sdtrain.data.filter import apply
from sdtrain.data.index import Index, build_index, find_shards
from sdtrain.data.layout import ABSENT, CAPTION, IMAGE
from sdtrain.data.manifest import merge_losses
from sdtrain.data.storage import Storage
from sdtrain.errors import ConfigError

if TYPE_CHECKING:
    from rich.table import Table

CELL, GROUND, COLUMNS = 192, 236, 6  # of the sheet: pixels, grey level, pictures in a row
BAR = 28
ENCODED = 1024  # pictures, for --latents


def main(argv: list[str] | None = None) -> int:
    """Print the tables, and draw the sheet."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("shards", metavar="SHARDS", nargs="+", help=".tar files, globs, folders, index folders")
    parser.add_argument("--sheet", metavar="PNG", type=Path, help="draw samples with their captions")
    parser.add_argument("--num", metavar="N", type=int, default=24, help="samples on the sheet; default: %(default)s")
    parser.add_argument("--seed", type=int, default=0, help="of which they are; default: %(default)s")
    parser.add_argument("--filter", metavar="COMPARISON", action="append", default=[], help="as in data.filter")
    parser.add_argument("--latents", metavar="RUN", help="what the autoencoder of a run, or of diffusers, does")
    parser.add_argument("--size", metavar="PIXELS", type=int, help="with --latents; default: what it was trained on")
    args = parser.parse_args(argv)
    try:
        whole = build_index(find_shards(args.shards, "SHARDS"))
        index, filtered = apply(whole, args.filter, "--filter")
        left_out = [[loss.reason, str(loss.count), loss.shard, loss.note] for loss in merge_losses(whole.losses)]
        tell(index.gathered(), [*left_out, *([text, str(count), "", "filtered"] for text, count in filtered.items())])
        if args.latents:
            tell_latents(index, args.latents, args.size, args.seed)
        if args.sheet:
            draw_sheet(index, args.num, args.seed).save(args.sheet)
            print(args.sheet)
    except (ConfigError, OSError) as error:
        print(error, file=sys.stderr)
        return 2
    return 0


def tell(index: Index, left_out: list[list[str]]) -> None:
    """All tables."""
    from rich.console import Console

    console = Console()
    sizes = ", ".join(f"{name} {count / 1e9:.3f} GB" for name, count in inspection.num_bytes(index).items())
    console.print(f"{len(index)} samples in {len(index.shards)} shards; {sizes}", highlight=False)
    spreads = {name: values for name, values in inspection.spreads(index).items() if values}
    if len(index):
        names = list(next(iter(spreads.values())))
        console.print(table("spread", names, [[name, *map(number, row.values())] for name, row in spreads.items()]))
    console.print(bars("shorter side, pixels", inspection.sides(index)))
    console.print(bars("width to height, nearest", inspection.aspects(index)))
    for name, counts in inspection.words(index).items():
        console.print(bars(name, counts))
    found = {"image": inspection.repeats(index, IMAGE), "caption": inspection.repeats(index, CAPTION)}
    rows = [[kind, *map(str, one)] for kind, one in found.items()]
    console.print(table("repeated", ["samples too many", "different ones", "most often", "for example"], rows))
    if left_out:
        console.print(table("left out, or worth a look", ["count", "where", "note"], left_out))


def table(title: str, names: list[str], rows: list[list[str]]) -> Table:
    """Names over columns of numbers."""
    from rich import box
    from rich.table import Column, Table
    from rich.text import Text

    made = Table(Column(title, no_wrap=True), *names, box=box.SIMPLE_HEAD)
    for row in rows:
        made.add_row(*(Text(cell) for cell in row))
    return made


def bars(title: str, counts: Mapping[str, int]) -> Table:
    """Counts, their share, and how that looks."""
    total, most = max(1, sum(counts.values())), max(1, *counts.values(), 1)
    rows = [
        [name, str(count), f"{100 * count / total:.1f} %", "#" * round(BAR * count / most)]
        for name, count in counts.items()
    ]
    return table(title, ["count", "share", ""], rows)


def number(value: float) -> str:
    """Four digits, or a whole number."""
    return f"{value:.0f}" if abs(value) >= 1000 or value == int(value) else f"{value:.4g}"


def tell_latents(index: Index, place: str, size: int | None, seed: int) -> None:
    """What `metric/latent_space.py` finds of some of the pictures."""
    import torch
    from rich.console import Console

    from sdtrain.data.reader import Reader
    from sdtrain.interop.encoder import load_encoder
    from sdtrain.metric.latent_space import LatentSpace
    from sdtrain.stage.base import images_at_once

    first_stage, trained_on = load_encoder(place, "--latents")
    size = size or trained_on
    if not size or size % first_stage.down_factor:
        raise ConfigError(f"--size: give the pictures' side, a multiple of {first_stage.down_factor}")
    reader, space = Reader(index, size), LatentSpace(seed=seed)
    picks = np.sort(np.random.default_rng(seed).choice(len(index), min(ENCODED, len(index)), replace=False))
    for ids in np.array_split(picks, -(-len(picks) // images_at_once(64, size))):
        image = reader.batch(ids, ids * 0)["image"]
        with torch.no_grad():
            space.add(image, torch.stack(first_stage.encode(image), dim=1))
    found, console = space.figures(), Console()
    correlation = "unknown" if (value := found["neighbour_correlation"]) is None else f"{value:.3f}"
    console.print(
        f"neighbours in pixels are neighbours in latents: rank correlation {correlation} over "
        f"{found['num_pairs']} pairs of {found['num_images']} pictures, {size} x {size}",
        highlight=False,
        soft_wrap=True,
    )
    values = zip(found["channel_mean"], found["channel_std"], found["told"])
    rows = [
        [str(channel), f"{mean:.3g}", f"{std:.3g}", f"{100 * told:.1f} %", "dead" * (channel in found["dead_channels"])]
        for channel, (mean, std, told) in enumerate(values)
    ]
    console.print(table("channel of latents", ["mean", "std", "told by the picture", ""], rows))


def draw_sheet(index: Index, num_samples: int, seed: int) -> object:
    """Some samples with their captions, whole; a crossed cell where the picture cannot be read."""
    from sdtrain.callback.grid import draw_grid
    from sdtrain.contracts import Preview

    if not len(index):
        raise ConfigError("--sheet: there is no sample to draw")
    picks = np.random.default_rng(seed).choice(len(index), min(num_samples, len(index)), replace=False)
    storage, images, captions = Storage(), [], []
    for sample in np.sort(picks).tolist():
        shard = index.shards[index.shard[sample]]
        image, caption = (
            b"" if size == ABSENT else storage.read(shard, int(offset), int(size))
            for offset, size in zip(index.offset[sample, : CAPTION + 1], index.size[sample, : CAPTION + 1])
        )
        try:
            images.append(whole_picture(image, *index.side[sample].tolist()))
            captions.append(clean_caption(caption) or "(no caption)")
        except BadSample as bad:
            images.append(crossed())
            captions.append(f"[{bad.reason}] {index.name(sample)}")
    return draw_grid(Preview(np.stack(images), captions, COLUMNS))


def whole_picture(data: bytes, width: int, height: int) -> np.ndarray:
    """uint8 (CELL, CELL, 3): the picture in its own shape, in the middle of a grey cell."""
    if not width:
        raise BadSample("unreadable_header")
    scale = CELL / max(width, height)
    rows, columns = max(1, round(height * scale)), max(1, round(width * scale))
    cell = np.full((CELL, CELL, 3), GROUND, np.uint8)
    top, left = (CELL - rows) // 2, (CELL - columns) // 2
    cell[top : top + rows, left : left + columns] = decode_image(data, rows, columns).pixels
    return cell


def crossed() -> np.ndarray:
    """An empty cell."""
    cell = np.full((CELL, CELL, 3), GROUND, np.uint8)
    cell[np.eye(CELL, dtype=bool) | np.eye(CELL, dtype=bool)[::-1]] = (200, 60, 60)
    return cell


if __name__ == "__main__":
    sys.exit(main())
