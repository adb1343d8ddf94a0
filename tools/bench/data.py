"""Reading and decoding samples beside webdataset's own pipeline and Pillow, in one process, A B A B.

    python tools/bench/data.py [--raw] [--decode] [--latents] [--rounds 5] [--samples 4000] [--litdata PYTHON]

raw     the bytes of picture and caption, checksum verified, in a random order, beside webdataset's tar iteration in
        the shards' order; samples of 50 KB. The limit is reading the same files from front to back, unlooked at.
        With --litdata (see litdata_peer.py) beside its own format as well, in order and without checksums.
decode  a 1024x768 JPEG to 256x256 beside Pillow's full decode and Lanczos; the limit is the decode at half size alone.
        Then batches of them from shards, with one worker and two: on two cores nothing is left for who trains.
latents stored latents (4x32x32, mean and std in fp16) with their captions, in a random order, as batches; beside
        webdataset with .npy members in the shards' order. The limit is reading the same files from front to back.
"""

from __future__ import annotations

import argparse
import io
import os
import tempfile
import time
from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path

import numpy as np
from PIL import Image
from timing import Contestant, compare, machine
from zlib_ng.zlib_ng import crc32

from sdtrain.data.datamodule import ShardDataModule
from sdtrain.data.decode import decode_image
from sdtrain.data.index import build_index
from sdtrain.data.latent_file import PREPROCESSING, PartWriter, finish, start
from sdtrain.data.latents import LatentDataModule
from sdtrain.data.layout import CAPTION, IMAGE
from sdtrain.data.members import Members
from sdtrain.data.shard_writer import write_shards
from sdtrain.data.storage import Storage
from sdtrain.ops.memory import keep_freed_memory

os.environ["WDS_SECURE"] = "1"
_BATCH = 64
_PICTURE_BYTES = 50_000
_SIZE = 256


def raw(rounds: int, num_samples: int, litdata: str | None) -> None:
    """Samples a second from page cache."""
    import webdataset

    with tempfile.TemporaryDirectory() as folder:
        shards = write_shards(_samples(num_samples), f"{folder}/%04d.tar")
        index = build_index(shards)
        order = np.random.default_rng(0).permutation(num_samples)
        buffer = bytearray(1 << 20)

        def ours() -> None:
            members = Members(index, Storage())
            for first in range(0, num_samples, _BATCH):
                for one in members.read(order[first : first + _BATCH], (CAPTION, IMAGE)):
                    assert len(one) == 2

        def plainly() -> None:
            for shard in shards:
                with open(shard, "rb", buffering=0) as file:
                    while file.readinto(buffer):
                        pass

        def theirs() -> None:
            urls = [str(shard) for shard in shards]
            read = webdataset.WebDataset(urls, shardshuffle=False, nodesplitter=None, empty_check=False)
            assert sum("txt" in sample for sample in read) == num_samples

        contestants = {"sdtrain": ours, "reading the bytes plainly": plainly}
        if litdata:
            told = [str(Path(__file__).with_name("litdata_peer.py")), f"{folder}/litdata", str(_PICTURE_BYTES)]
            contestants["litdata, its own format"] = Contestant([*told, str(num_samples)], litdata)
        medians = compare(contestants | {"webdataset": theirs}, rounds)
        num_bytes = sum(shard.stat().st_size for shard in shards)
        print(f"  crc32 of {crc32.__module__}")
        _tell(medians, num_samples, "samples/s", num_bytes)
        print(f"  {medians['reading the bytes plainly'] / medians['sdtrain']:.0%} of reading the bytes plainly")


def decode(rounds: int, *_: object) -> None:
    """Pictures a second, and how like the slow way's they are."""
    pictures = [_jpeg(number) for number in range(8)]

    def over(one: Callable[[bytes], object]) -> Callable[[], None]:
        def run() -> None:
            for data in pictures:
                one(data)

        return run

    def half(data: bytes) -> None:
        image = Image.open(io.BytesIO(data))
        image.draft(None, (image.width // 2, image.height // 2))
        image.load()

    contestants = {
        "sdtrain": over(lambda data: decode_image(data, _SIZE, _SIZE)),
        "decoding at half size, nothing else": over(half),
        "Pillow, full decode and Lanczos": over(_full),
    }
    medians = compare(contestants, rounds)
    _tell(medians, len(pictures), "pictures/s")
    errors = [
        np.square(decode_image(data, _SIZE, _SIZE).pixels.astype(float) - _full(data)).mean() for data in pictures
    ]
    print(f"  PSNR to Pillow's full decode and Lanczos: at least {10 * np.log10(255**2 / max(errors)):.1f} dB")
    with tempfile.TemporaryDirectory() as folder:
        samples = [{"__key__": f"{n:08d}", "jpg": pictures[n % 8], "txt": f"picture {n}".encode()} for n in range(1024)]
        write_shards(samples, f"{folder}/%04d.tar")
        _tell_workers(lambda workers: ShardDataModule(folder, image_size=_SIZE, num_workers=workers), 12)


def latents(rounds: int, num_samples: int, *_: object) -> None:
    """Samples a second from page cache, on one core; and with one worker and two."""
    import webdataset

    with tempfile.TemporaryDirectory() as folder:
        out = _cache(Path(folder), num_samples)
        peer = [str(shard) for shard in write_shards(_as_npy(num_samples), f"{folder}/npy-%04d.tar")]
        paths = sorted((out / "parts").glob("*.bin"))
        data = _connected(LatentDataModule(str(out), image_size=256))
        num_train = data.num_train // _BATCH * _BATCH
        order = np.random.default_rng(0).permutation(data.num_train)[:num_train].reshape(-1, _BATCH)
        buffer = bytearray(1 << 20)

        def ours() -> None:
            for ids in order:
                assert data.load("train", ids)["latent"].shape == (_BATCH, 2, 4, 32, 32)

        def plainly() -> None:
            for path in paths:
                with open(path, "rb", buffering=0) as file:
                    while file.readinto(buffer):
                        pass

        def theirs() -> None:
            read = webdataset.WebDataset(peer, shardshuffle=False, nodesplitter=None, empty_check=False)
            read = read.decode().to_tuple("lat.npy", "txt").batched(_BATCH)
            assert sum(1 for _ in islice(read, len(order))) == len(order)

        contestants = {"sdtrain": ours, "reading the bytes plainly": plainly, "webdataset with .npy members": theirs}
        medians = compare(contestants, rounds)
        _tell(medians, num_train, "samples/s", sum(path.stat().st_size for path in paths))
        _tell_workers(lambda workers: LatentDataModule(str(out), image_size=256, num_workers=workers), 10 * len(order))


def _cache(folder: Path, num_samples: int) -> Path:
    """What tools/precompute_latents.py writes, of tiny pictures; the latents' values are of no interest here."""
    chance = np.random.default_rng(0)
    image = Image.new("RGB", (16, 16))
    image.save(buffer := io.BytesIO(), "PNG")
    samples = [
        {"__key__": f"{n:08d}", "png": buffer.getvalue(), "txt": f"picture {n} of many".encode()}
        for n in range(num_samples)
    ]
    index = build_index(write_shards(samples, folder / "pictures-%04d.tar"))
    first_stage = {"latent_channels": 4, "down_factor": 8}
    job = {"first_stage": first_stage, "preprocessing": PREPROCESSING, "image_size": 256, "buckets": None}
    job |= {"has_flips": False}
    start(folder / "out", job)

    def encode(pixels: np.ndarray) -> np.ndarray:
        return chance.standard_normal((len(pixels), 2, 4, 32, 32), np.float32).astype(np.float16)

    writer = PartWriter(folder / "out", index, 256, None, encode, lambda *_: _BATCH)
    for part in range(len(index.shards)):
        writer.write(part)
    finish(folder / "out", index, job)
    return folder / "out"


def _as_npy(num_samples: int) -> Iterator[dict[str, object]]:
    chance = np.random.default_rng(0)
    for n in range(num_samples):
        np.save(buffer := io.BytesIO(), chance.standard_normal((2, 4, 32, 32), np.float32).astype(np.float16))
        yield {"__key__": f"{n:08d}", "lat.npy": buffer.getvalue(), "txt": f"picture {n} of many".encode()}


def _connected(data: ShardDataModule) -> ShardDataModule:
    data.connect(0, _BATCH)
    data.setup()
    return data


def _tell_workers(module: Callable[[int], ShardDataModule], num_batches: int) -> None:
    rates = []
    for workers in (1, 2):
        batches = iter(_connected(module(workers)).train_dataloader())
        for _ in range(4 * workers):
            next(batches)
        begun = time.perf_counter()
        for _ in range(num_batches * workers):
            next(batches)
        rates.append(workers * num_batches * _BATCH / (time.perf_counter() - begun))
    print(f"  through workers: {rates[0]:.0f} samples/s with one, {rates[1] / rates[0]:.2f}x with two")


def _tell(medians: dict[str, float], number: int, unit: str, num_bytes: int = 0) -> None:
    for name, seconds in medians.items():
        rate = f", {num_bytes / seconds / 1e9:5.2f} GB/s" if num_bytes else ""
        print(f"  {name:44s} {number / seconds:9.0f} {unit}{rate}")


def _samples(number: int) -> list[dict[str, object]]:
    """As large as pictures are, with the header of one; nobody decodes them here."""
    chance, head = np.random.default_rng(0), _jpeg(0)[:2000]
    return [
        {
            "__key__": f"{n:08d}",
            "jpg": head + chance.bytes(_PICTURE_BYTES - 2000),
            "txt": f"picture {n} of many".encode(),
        }
        for n in range(number)
    ]


def _jpeg(seed: int) -> bytes:
    """1024x768, with the spectrum of a photograph: amplitudes fall with the frequency."""
    chance = np.random.default_rng(seed)
    rows, columns = np.fft.fftfreq(768)[:, None], np.fft.rfftfreq(1024)[None]
    fall = 1 / np.maximum(np.hypot(rows, columns), 1 / 1024) ** 1.2
    phases = np.exp(2j * np.pi * chance.random((3, *fall.shape)))
    pixels = np.fft.irfft2(fall * phases, (768, 1024)).transpose(1, 2, 0)
    pixels = 128 + 50 * pixels / pixels.std()
    image = Image.fromarray(pixels.clip(0, 255).astype(np.uint8))
    image.save(buffer := io.BytesIO(), "JPEG", quality=90)
    return buffer.getvalue()


def _full(data: bytes) -> np.ndarray:
    image = Image.open(io.BytesIO(data)).convert("RGB")
    side = min(image.size)
    left, top = (image.width - side) // 2, (image.height - side) // 2
    box = (left, top, left + side, top + side)
    return np.asarray(image.resize((_SIZE, _SIZE), Image.Resampling.LANCZOS, box=box))


SECTIONS = {"raw": raw, "decode": decode, "latents": latents}


def main() -> None:
    """Prints medians, ratios and limits of the sections asked for, of all by default."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, section in SECTIONS.items():
        parser.add_argument(f"--{name}", action="store_true", help=section.__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--samples", type=int, default=4000)
    parser.add_argument("--litdata", metavar="PYTHON", help="of a venv that has litdata")
    arguments = parser.parse_args()
    keep_freed_memory()  # as `python -m sdtrain` does; the peers in this process gain by it too
    print(machine())
    for name in [name for name in SECTIONS if getattr(arguments, name)] or SECTIONS:
        print(name)
        SECTIONS[name](arguments.rounds, arguments.samples, arguments.litdata)


if __name__ == "__main__":
    main()
