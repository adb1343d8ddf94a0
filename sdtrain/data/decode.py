"""Image bytes -> uint8 RGB of the size asked for: three formats only, within limits read from the header.

The picture is scaled to cover the target, in its own proportions, and what stands out is left away before anything is
resized. A JPEG that is far larger than its target is decoded at 1/2, 1/4 or 1/8, which its cosine transform gives
nearly for free; the rest of the way is Lanczos.
"""

from __future__ import annotations

import io
import math
import warnings
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image
from torch.nn import functional as F

from sdtrain.data.bad_sample import BadSample

FORMATS = ("JPEG", "PNG", "WEBP")
MAX_IMAGE_BYTES = 32 * 1024 * 1024
# By what a decoder holds at once, so that one picture takes less than 200 MB: a JPEG is decoded smaller, the others are
# decoded whole, a PNG with alpha into two pictures of 4 bytes a pixel, a WebP into four.
MAX_PIXELS = {"JPEG": 64_000_000, "PNG": 20_000_000, "WEBP": 9_000_000}
# What a JPEG takes is known once its target is: it may be more only where the target itself is larger than 3100 pixels
# square, and its float32 picture takes as much again.
MAX_DECODING_BYTES = 195_000_000
_MAX_DECODING_BYTES_PER_PIXEL = 20  # of the target
MAX_SIDE = 16_384
MIN_SIDE = 8  # what is smaller is a tracking pixel, not a picture of its caption

# How much larger than its target a JPEG that was decoded smaller must still be: the transform cuts frequencies off
# abruptly, which a resize by this much hides (at least 38 dB to decoding it whole; 34 dB at 1.0).
_MIN_RATIO = 1.4
_BAND_PIXELS = 1 << 20  # that are looked at together where numpy wants wider numbers
_MAX_COPIED_PIXELS = 1 << 24  # larger pictures are resized where Pillow holds them, in strips of so many rows
_STRIP_ROWS = 256

_ORIENTATION = 0x0112
# EXIF orientation -> what makes the stored picture upright: swap rows and columns, then reverse rows, reverse columns
_UPRIGHT = (False, False, False)
_TURNS = {
    2: (False, False, True),
    3: (False, True, True),
    4: (False, True, False),
    5: (True, False, False),
    6: (True, False, True),
    7: (True, True, True),
    8: (True, True, False),
}

# Between these limits and its own limit Pillow warns in open(); the check below refuses right after.
warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)


class Decoded(NamedTuple):
    """A picture as it is trained on, and what it was cut from."""

    pixels: np.ndarray  # uint8 (H, W, 3)
    original_size: tuple[int, int]  # height and width, upright
    crop_top_left: tuple[int, int]  # in pixels of the picture as it is scaled to cover the target, and flipped


def decode_image(
    data: bytes,
    height: int,
    width: int,
    crop: tuple[float, float] = (0.5, 0.5),
    flip: bool = False,
    ground: tuple[int, int, int] = (255, 255, 255),
    is_whole: bool = False,
) -> Decoded:
    """Turn upright, flip, scale to cover, crop. Of an animation the first frame is taken.

    Args:
        data: the file.
        crop: where the crop stands between top and bottom, left and right, each from 0 to 1: of uniform numbers, every
            place is as likely.
        flip: mirror the picture, left to right.
        ground: what is seen through transparent pixels, as RGB.
        is_whole: decode a JPEG in its full size, so that files of one size, whatever their formats, are cut alike.

    Raises:
        BadSample: where there is no picture to be had.
    """
    image = open_image(data)
    is_transposed, *reverses = _turn(image)
    reverses[1] ^= flip
    stored, target = image.size[::-1], (height, width)
    original = stored[::-1] if is_transposed else stored
    if is_transposed:  # from here to the resize in the stored picture's own rows and columns
        target, reverses, crop = target[::-1], reverses[::-1], crop[::-1]
    factor = min(old / new for old, new in zip(stored, target))
    part = _shrink(image, 1.0 if is_whole else factor)
    _check_bytes(image, data, stored, height * width)
    image = _load(image, ground)
    factor /= part
    slack = [max(old / part - new * factor, 0.0) for old, new in zip(stored, target)]
    start, cut = [], []
    for room, place, is_reversed in zip(slack, crop, reverses):
        first = min(int(place * (int(room) + 1)), int(room))  # whole pixels of the decoded picture
        start.append(int(room) - first if is_reversed else first)
        cut.append(round((room - start[-1] if is_reversed else start[-1]) / factor))
    pixels = _resize(image, factor, start, target)
    del image  # before what is reversed or turned is copied
    pixels = pixels[:: -1 if reverses[0] else 1, :: -1 if reverses[1] else 1]
    if is_transposed:
        pixels, cut = pixels.transpose(1, 0, 2), cut[::-1]  # (H, W, 3)
    return Decoded(np.ascontiguousarray(pixels), original, tuple(cut))


def open_image(data: bytes) -> Image.Image:
    """The picture with its header read and within the limits, nothing decoded. Raises BadSample."""
    if len(data) > MAX_IMAGE_BYTES:
        raise BadSample("image_too_large", f"{len(data)} bytes")
    try:
        image = Image.open(io.BytesIO(data), formats=FORMATS)
    except Image.UnidentifiedImageError as error:
        raise BadSample("not_an_image") from error
    except Image.DecompressionBombError as error:
        raise BadSample("too_many_pixels", str(error)) from error
    except MemoryError:
        raise
    except Exception as error:  # whatever a crafted file makes a decoder raise
        raise BadSample("decode_error", str(error)) from error
    width, height = image.size
    if width * height > MAX_PIXELS.get(image.format, MAX_PIXELS["JPEG"]) or max(width, height) > MAX_SIDE:
        raise BadSample("too_many_pixels", f"{width}x{height}")
    if min(width, height) < MIN_SIDE:
        raise BadSample("too_small", f"{width}x{height}")
    return image


def upright_size(image: Image.Image) -> tuple[int, int]:
    """Width and height after the EXIF orientation."""
    return image.size[::-1] if _turn(image)[0] else image.size


def _turn(image: Image.Image) -> tuple[bool, bool, bool]:
    """What makes it upright; a broken EXIF block leaves the picture as it is."""
    if image.format == "PNG" and "exif" not in image.info:
        return _UPRIGHT  # Pillow would decode the pixels to look behind them
    try:
        return _TURNS.get(image.getexif().get(_ORIENTATION), _UPRIGHT)
    except MemoryError:
        raise
    except Exception:
        return _UPRIGHT


def _shrink(image: Image.Image, factor: float) -> int:
    """A JPEG will be decoded to 1/2, 1/4 or 1/8 where that is still large enough; that number."""
    width, height = image.size
    part = next((part for part in (8, 4, 2) if factor >= _MIN_RATIO * part), 1)
    image.draft(None, (width // part, height // part))  # other formats take no notice
    return part if image.size != (width, height) else 1


def _check_bytes(image: Image.Image, data: bytes, stored: tuple[int, int], target_pixels: int) -> None:
    """Refuses a JPEG that would take too much memory, whatever of it is wanted."""
    if image.format != "JPEG":
        return
    num_bytes = 3 * target_pixels + image.width * image.height * (8 if image.mode == "CMYK" else 4)
    if _has_several_scans(data, len(image.layer)):  # then the decoder keeps all of its coefficients
        largest = max(across * down for _, across, down, _ in image.layer)
        share = sum(across * down for _, across, down, _ in image.layer) / largest
        num_bytes += int(2 * share * stored[0] * stored[1])
    limit = max(MAX_DECODING_BYTES, _MAX_DECODING_BYTES_PER_PIXEL * target_pixels)
    if num_bytes > limit:
        raise BadSample("too_many_pixels", f"decoding takes {num_bytes >> 20} MiB, the limit is {limit >> 20}")


def _has_several_scans(data: bytes, num_components: int) -> bool:
    """Whether the first scan leaves components or details to others; in doubt it does."""
    place, is_sequential = 2, False
    while data[place : place + 1] == b"\xff":
        marker, size = data[place + 1], int.from_bytes(data[place + 2 : place + 4], "big")
        is_sequential |= marker in (0xC0, 0xC1)
        if marker == 0xDA:
            return not is_sequential or data[place + 4] < num_components
        place += 2 + size
    return True


def _load(image: Image.Image, ground: tuple[int, int, int]) -> Image.Image:
    """The picture in RGB."""
    try:
        image.load()
        return _to_rgb(image, ground)
    except MemoryError:
        raise
    except Exception as error:
        raise BadSample("decode_error", str(error)) from error


def _to_rgb(image: Image.Image, ground: tuple[int, int, int]) -> Image.Image:
    if image.mode.startswith("I"):  # 16-bit grey: convert() would saturate nearly every pixel
        image = Image.fromarray(np.concatenate([_to_grey(rows) for rows in _bands(image, (0, 0, *image.size))]))
    if image.has_transparency_data:  # convert("RGB") would show the colours hidden under transparent pixels
        if image.mode != "RGBA":
            image = image.convert("RGBA")
        whole = Image.new("RGB", image.size, ground)
        whole.paste(image, mask=image)
        return whole
    return image if image.mode == "RGB" else image.convert("RGB")


def _bands(image: Image.Image, box: tuple[int, int, int, int]) -> Iterator[np.ndarray]:
    """The pixels of a box, from top to bottom: what Pillow gives numpy it copies twice."""
    left, top, right, bottom = box
    height = max(1, _BAND_PIXELS // (right - left))
    for first in range(top, bottom, height):
        yield np.asarray(image.crop((left, first, right, min(first + height, bottom))))  # (h, W) or (h, W, 3)


def _to_grey(rows: np.ndarray) -> np.ndarray:
    return ((rows.astype(np.int32).clip(0, 65535) + 128) // 257).astype(np.uint8)


def _resize(image: Image.Image, factor: float, start: Sequence[int], target: Sequence[int]) -> np.ndarray:
    """uint8 (H, W, 3): the target, from `start`, each of its pixels `factor` pixels of the picture wide.

    The factor is not a quotient of sizes: a JPEG's are rounded up when it is decoded smaller, and to scale what was
    added with the rest costs 15 dB.
    """
    (top, left), (height, width) = start, target
    bottom, right = top + height * factor, left + width * factor
    if factor == 1:
        return _joined(_bands(image, (left, top, left + width, top + height)), height, width)
    if (bottom - top) * (right - left) > _MAX_COPIED_PIXELS:
        return _joined(_resized(image, factor, start, target), height, width)
    reach = math.ceil(3 * max(factor, 1))  # as far as the filter looks
    right, bottom = min(math.ceil(right) + reach, image.width), min(math.ceil(bottom) + reach, image.height)
    pixels = _joined(_bands(image, (left, top, right, bottom)), bottom - top, right - left)
    # torch's Lanczos is Pillow's to within two levels, in a third of the time, and the same on every instruction set.
    tensor = torch.from_numpy(pixels).unsqueeze(0).permute(0, 3, 1, 2)  # (1, 3, h, w), channels last
    scale = (1 + 1e-9) / factor  # the size is rounded down
    found = F.interpolate(tensor, scale_factor=(scale, scale), mode="lanczos", antialias=True)
    return found[0, :, :height, :width].permute(1, 2, 0).numpy()  # (H, W, 3)


def _joined(bands: Iterator[np.ndarray], height: int, width: int) -> np.ndarray:
    """One under the other, uint8 (H, W, 3)."""
    pixels, row = np.empty((height, width, 3), np.uint8), 0
    for band in bands:
        pixels[row : (row := row + len(band))] = band
    return pixels


def _resized(image: Image.Image, factor: float, start: Sequence[int], target: Sequence[int]) -> Iterator[np.ndarray]:
    """Strips of the target. The filter looks beyond a strip's own rows, so that they are those of one resize."""
    (top, left), (height, width) = start, target
    right = min(left + width * factor, image.width)
    for row in range(0, height, _STRIP_ROWS):
        num = min(_STRIP_ROWS, height - row)
        box = (left, top + row * factor, right, min(top + (row + num) * factor, image.height))
        yield np.asarray(image.resize((width, num), Image.Resampling.LANCZOS, box=box))  # (h, W, 3)
