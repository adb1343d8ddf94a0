"""Reading and decoding samples beside webdataset's own pipeline and Pillow, in one process, A B A B.

    python tools/bench/data.py [--raw] [--decode] [--rounds 5] [--samples 4000]

raw     the bytes of picture and caption, checksum verified, in a random order, beside webdataset's tar iteration in
        the shards' order; samples of 50 KB. The limit is reading the same files from front to back, unlooked at.
decode  a 1024x768 JPEG to 256x256 beside Pillow's full decode and Lanczos; the limit is the decode at half size alone.
"""

from __future__ import annotations

import argparse
import io
import os
import tempfile
from collections.abc import Callable

import numpy as np
from PIL import Image
from timing import compare, machine
from zlib_ng.zlib_ng import crc32

from sdtrain.data.decode import decode_image
from sdtrain.data.index import CAPTION, IMAGE, build_index
from sdtrain.data.members import Members
from sdtrain.data.shard_writer import write_shards
from sdtrain.data.storage import Storage
from sdtrain.ops.memory import keep_freed_memory

os.environ["WDS_SECURE"] = "1"
_BATCH = 64
_PICTURE_BYTES = 50_000
_SIZE = 256


def raw(rounds: int, num_samples: int) -> None:
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

        contestants = {"sdtrain": ours, "reading the bytes plainly": plainly, "webdataset": theirs}
        medians = compare(contestants, rounds)
        num_bytes = sum(shard.stat().st_size for shard in shards)
        print(f"  crc32 of {crc32.__module__}")
        _tell(medians, num_samples, "samples/s", num_bytes)
        print(f"  {medians['reading the bytes plainly'] / medians['sdtrain']:.0%} of reading the bytes plainly")


def decode(rounds: int, num_samples: int) -> None:  # noqa: ARG001  each section has the same arguments
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


SECTIONS = {"raw": raw, "decode": decode}


def main() -> None:
    """Prints medians, ratios and limits of the sections asked for, of all by default."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, section in SECTIONS.items():
        parser.add_argument(f"--{name}", action="store_true", help=section.__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--samples", type=int, default=4000)
    arguments = parser.parse_args()
    keep_freed_memory()  # as `python -m sdtrain` does; the peers in this process gain by it too
    print(machine())
    for name in [name for name in SECTIONS if getattr(arguments, name)] or SECTIONS:
        print(name)
        SECTIONS[name](arguments.rounds, arguments.samples)


if __name__ == "__main__":
    main()
