"""Image bytes -> uint8 RGB square. Pillow only, three formats only, header limits before a pixel is decoded."""

from __future__ import annotations

import io
import warnings

import numpy as np
from PIL import Image, ImageOps

from sdtrain.data.bad_sample import BadSample

FORMATS = ("JPEG", "PNG", "WEBP")
MAX_IMAGE_BYTES = 32 * 1024 * 1024
MAX_PIXELS = 64_000_000
MAX_SIDE = 16_384
MIN_SIDE = 8  # what is smaller is a tracking pixel, not a picture of its caption

# Between MAX_PIXELS and its own limit Pillow warns in open(); the check below refuses right after.
warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)


def decode_image(data: bytes, image_size: int) -> np.ndarray:
    """Scale to cover, centre crop: uint8 (image_size, image_size, 3). Raises BadSample."""
    image = _open(data)
    if image.format == "JPEG":
        image.draft(None, (2 * image_size, 2 * image_size))  # decodes at 1/2, 1/4 or 1/8 when the target is far smaller
    try:
        image.load()
    except MemoryError:
        raise
    except Exception as error:  # whatever a crafted file makes a decoder raise
        raise BadSample("decode_error", str(error)) from error
    image = _to_rgb(_upright(image))
    return np.asarray(_cover(image, image_size))  # (H, W, 3)


def _open(data: bytes) -> Image.Image:
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
    except Exception as error:
        raise BadSample("decode_error", str(error)) from error
    width, height = image.size
    if width * height > MAX_PIXELS or max(width, height) > MAX_SIDE:
        raise BadSample("too_many_pixels", f"{width}x{height}")
    if min(width, height) < MIN_SIDE:
        raise BadSample("too_small", f"{width}x{height}")
    return image


def _upright(image: Image.Image) -> Image.Image:
    """Apply the EXIF orientation; a broken EXIF block leaves the picture as it is."""
    try:
        ImageOps.exif_transpose(image, in_place=True)
    except MemoryError:
        raise
    except Exception:
        return image
    return image


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I"):  # 16-bit grey: convert() would saturate nearly every pixel
        grey = (np.asarray(image).astype(np.int64).clip(0, 65535) + 128) // 257
        image = Image.fromarray(grey.astype(np.uint8))
    if image.has_transparency_data:  # convert("RGB") would show the colours hidden under transparent pixels
        image = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
    return image if image.mode == "RGB" else image.convert("RGB")


def _cover(image: Image.Image, image_size: int) -> Image.Image:
    if image.size == (image_size, image_size):
        return image
    width, height = image.size
    side = min(width, height)
    left, top = (width - side) / 2, (height - side) / 2
    box = (left, top, left + side, top + side)
    return image.resize((image_size, image_size), Image.Resampling.BICUBIC, box=box, reducing_gap=2.0)
