"""Encode the pictures of shards once, for training with `data=latents data.folder=OUT`.

    python tools/precompute_latents.py FIRST_STAGE SHARDS... --out OUT
    torchrun --nproc-per-node 8 tools/precompute_latents.py FIRST_STAGE SHARDS... --out OUT      on 8 devices

FIRST_STAGE is a run's directory or a diffusers folder with an autoencoder. Shards are divided among the processes; any
number of them makes the same files. What is finished is kept: start it again after a stop, on as many as you like, and
it goes on. Started again when all is done, it checks the files against their checksums.

With --text the captions are encoded, too, for a frozen conditioner of the same settings; latents that are there stay.
For several text encoders (SDXL's two, SD 3's three) start it again with each of them: all are kept, and read together.
"""

from __future__ import annotations

import argparse
import json
import sys
from contextlib import nullcontext
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sdtrain.errors import ConfigError

if TYPE_CHECKING:
    import numpy as np
    import torch
    from torch import nn

    from sdtrain.data.index import Index
    from sdtrain.data.latent_file import Encode
    from sdtrain.data.text_file import Encode as TextEncode

_MOST_PICTURES, _MOST_PIXELS = 128, 1 << 22  # encoded at once
LAYERS = ("last", "penultimate", "penultimate_norm")
_LONGEST = timedelta(days=30)  # that one process may need longer than another


def main(argv: list[str] | None = None) -> int:
    """0 where all is well, 1 where files are damaged, 2 where the arguments are wrong."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("first_stage", metavar="FIRST_STAGE", help="see above")
    parser.add_argument("shards", metavar="SHARDS", nargs="+", help=".tar files, globs in quotes, folders, indexes")
    parser.add_argument("--out", metavar="OUT", type=Path, required=True, help="made if absent")
    parser.add_argument("--size", metavar="PIXELS", type=int, help="default: what the first stage was trained on")
    parser.add_argument("--buckets", metavar="STEP", type=int, help="other shapes too, sides multiples of this")
    parser.add_argument("--max-ratio", metavar="R", type=float, default=2.0, help="with --buckets: %(default)s")
    parser.add_argument("--max-upscale", metavar="R", type=float, default=1.0, help="with --buckets: %(default)s")
    parser.add_argument("--flips", action="store_true", help="the mirrored pictures, too: twice the size")
    parser.add_argument("--text", metavar="FOLDER", help="what a frozen CLIP or T5 makes of the captions, too")
    parser.add_argument("--text-layer", default="last", choices=LAYERS, help="conditioner.layer, CLIP's: %(default)s")
    parser.add_argument("--text-tokens", metavar="N", type=int, default=77, help="conditioner.max_tokens: %(default)s")
    parser.add_argument("--text-pooled", action="store_true", help="keep the pooled output, too; CLIP's")
    parser.add_argument("--text-masked", action="store_true", help="for conditioner.masked=true: padding is not kept")
    args = parser.parse_args(argv)
    try:
        return precompute(args)
    except (ConfigError, OSError) as error:
        print(error, file=sys.stderr)
        return 2


def precompute(args: argparse.Namespace) -> int:
    """Encode what is missing; the first process puts it together and tells."""
    import torch

    from sdtrain.data.bucket import Buckets
    from sdtrain.data.index import build_index, find_shards
    from sdtrain.data.latent_file import ABOUT, PREPROCESSING, PartWriter, finish, start
    from sdtrain.interop.encoder import load_encoder
    from sdtrain.stage.latents import identity

    rank, world, barrier = _ranks()
    device = torch.device("cuda", rank % torch.cuda.device_count()) if torch.cuda.is_available() else "cpu"
    first_stage, trained_on = load_encoder(args.first_stage, "FIRST_STAGE")
    if args.size is None and trained_on is None:
        raise ConfigError(f"--size: nothing in {args.first_stage} says what size it was trained on; give it")
    size = args.size or trained_on
    if size % first_stage.down_factor:
        raise ConfigError(f"--size: {size} is no multiple of {first_stage.down_factor}")
    buckets = {"step": args.buckets, "max_ratio": args.max_ratio, "max_upscale": args.max_upscale}
    buckets = buckets if args.buckets else None
    index = build_index(find_shards(args.shards, "SHARDS"))
    job = {
        "first_stage": identity(first_stage),
        "preprocessing": PREPROCESSING,
        "image_size": size,
        "buckets": buckets,
        "crop": "center",
        "has_flips": args.flips,
        "dtype": "float16",
        "source": index.fingerprint,
    }
    if rank == 0:
        start(args.out, job)
    barrier()
    if rank != 0:
        start(args.out, job)
    if (args.out / ABOUT).exists():
        barrier()
        code = check(args.out) if rank == 0 else 0
        return code or add_text(args, device, rank, world, barrier)
    table = Buckets(**buckets).table(size) if buckets else None
    writer = PartWriter(
        args.out, index, size, table, encoder(first_stage, device), _pictures_at_once, has_flips=args.flips
    )
    write(writer, index, rank, world)
    barrier()
    if rank == 0:
        about = finish(args.out, index, job)
        left_out = ", ".join(f"{reason} {count}" for reason, count in about["left_out"].items() if count)
        num_bytes = sum(part["num_bytes"] for part in about["parts"])
        print(f"{about['num_samples']} samples, {num_bytes / 1e9:.2f} GB; left out: {left_out or 'none'}")
        print(f"next: data=latents data.folder={args.out} data.image_size={size}")
    barrier()
    return add_text(args, device, rank, world, barrier)


def add_text(args: argparse.Namespace, device: torch.device | str, rank: int, world: int, barrier: Any) -> int:  # noqa: ANN401
    """The text embeddings of a finished cache."""
    from sdtrain.data.latent_file import find_damage, read_about, start
    from sdtrain.data.sealed import read_sealed
    from sdtrain.data.text_file import ABOUT, encoder_folder, finish_text, text_job, write_text_part
    from sdtrain.stage.latents import text_identity

    if args.text is None:
        return 0
    about, part = read_about(args.out), load_text(args).to(device)
    job = text_job(about, text_identity(part))
    here = encoder_folder(args.out, job["encoder"])
    if rank == 0:
        start(here, job)
    barrier()
    if rank != 0:
        start(here, job)
    if not (here / ABOUT).exists():
        for number in range(rank, len(about["parts"]), world):
            write_text_part(args.out, here, about, number, text_encoder(part))
        cut, read = part.cut_captions()
        if cut:
            print(f"{cut} of {read} captions are longer than --text-tokens {args.text_tokens} and lose their end")
        barrier()
        if rank == 0:
            told = finish_text(here, about, job)
            num_bytes = sum(one["num_bytes"] for one in told["parts"])
            print(f"{told['num_samples']} text embeddings, {num_bytes / 1e9:.2f} GB, by {args.text}")
    elif rank == 0 and (damaged := find_damage(here, read_sealed(here / ABOUT))):
        print(f"{', '.join(damaged)} damaged; remove {here} and start again", file=sys.stderr)
        return 1
    barrier()
    return 0


def load_text(args: argparse.Namespace) -> nn.Module:
    """The frozen text encoder, as a conditioner has it."""
    from sdtrain.conditioner.clip import CLIP
    from sdtrain.conditioner.pretrained import find_folder
    from sdtrain.conditioner.t5 import T5

    config = json.loads((find_folder(args.text, "text encoder") / "config.json").read_text())
    how = {"pretrained": args.text, "max_tokens": args.text_tokens, "masked": args.text_masked, "dropout": 0.0}
    if "d_model" in config:
        return T5(**how, width=config["d_model"])
    text = config.get("text_config", config)
    is_projected = config.get("architectures") != ["CLIPTextModel"]
    pooled = config.get("projection_dim", text.get("projection_dim")) if is_projected else text["hidden_size"]
    pooled_width = pooled if args.text_pooled else None
    return CLIP(**how, width=text["hidden_size"], pooled_width=pooled_width, layer=args.text_layer)


def text_encoder(part: nn.Module) -> TextEncode:
    """Captions to their hidden states and pooled outputs in float16; without padding where that is masked."""
    import torch

    @torch.no_grad()
    def encode(captions: list[str]) -> list[tuple[np.ndarray, np.ndarray | None]]:
        told = part({"caption": captions})
        states = told["context"].half().cpu().numpy()
        pooled = told["pooled"].half().cpu().numpy() if "pooled" in told else [None] * len(captions)
        masked = told.get("context_mask")
        lengths = [states.shape[1]] * len(captions) if masked is None else masked.sum(dim=1).tolist()
        return [(one[:length], whole) for one, length, whole in zip(states, lengths, pooled)]

    return encode


def encoder(first_stage: nn.Module, device: torch.device | str) -> Encode:
    """Pictures uint8 (B, H, W, 3) to mean and std (B, 2, C, h, w) in float16."""
    import torch

    from sdtrain.data.view import to_float

    first_stage.to(device)

    @torch.no_grad()
    def encode(pixels: np.ndarray) -> np.ndarray:
        return torch.stack(first_stage.encode(to_float(pixels).to(device)), dim=1).half().cpu().numpy()

    return encode


def write(writer: Any, index: Index, rank: int, world: int) -> None:  # noqa: ANN401 a PartWriter
    """This process's parts, with a bar on the first one's standard error."""
    from rich.console import Console
    from rich.progress import track

    parts = range(rank, len(index.shards), world)
    bar = track(parts, "encoding shards", console=Console(stderr=True), transient=True) if rank == 0 else parts
    for part in bar:
        writer.write(part)


def check(out: Path) -> int:
    """Say which files are not what was written."""
    from sdtrain.data.latent_file import find_damage, read_about

    damaged = find_damage(out, read_about(out))
    for path in damaged:
        print(f"{path} is damaged; remove it, its .json and {out / 'latents.json'}, and start again", file=sys.stderr)
    print(f"finished before; {len(read_about(out)['parts']) - len(damaged)} files are what was written")
    return 1 if damaged else 0


def _pictures_at_once(height: int, width: int) -> int:
    return max(1, min(_MOST_PICTURES, _MOST_PIXELS // (height * width)))


def _ranks() -> tuple[int, int, Any]:
    """Rank, world size, and what waits for the others."""
    from torch import distributed

    if not distributed.is_torchelastic_launched():
        return 0, 1, nullcontext
    distributed.init_process_group("gloo", timeout=_LONGEST)
    return distributed.get_rank(), distributed.get_world_size(), distributed.barrier


if __name__ == "__main__":
    sys.exit(main())
