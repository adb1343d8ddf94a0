"""Every sort of picture becomes a uint8 RGB square, or a reason."""

import io
import struct
import zlib

import numpy as np
import pytest
from PIL import Image

from sdtrain.data.bad_sample import REASONS, BadSample
from sdtrain.data.decode import decode_image


def encode(image, format="PNG", **options):
    buffer = io.BytesIO()
    image.save(buffer, format, **options)
    return buffer.getvalue()


def reason(data, image_size=32):
    with pytest.raises(BadSample) as error:
        decode_image(data, image_size)
    assert error.value.reason in REASONS
    return error.value.reason


def halves(width, height, left, right):
    pixels = np.empty((height, width, 3), np.uint8)
    pixels[:, : width // 2], pixels[:, width // 2 :] = left, right
    return Image.fromarray(pixels)


def png_header(width, height):
    """A PNG that claims a size and has no pixels."""
    head = b"IHDR" + struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + struct.pack(">I", 13) + head + struct.pack(">I", zlib.crc32(head)) + b"\0\0\0\0IDAT"


def test_same_size_is_bit_exact():
    pixels = np.random.default_rng(0).integers(0, 256, (32, 32, 3), np.uint8)
    assert np.array_equal(decode_image(encode(Image.fromarray(pixels)), 32), pixels)
    assert np.array_equal(decode_image(encode(Image.fromarray(pixels), "WEBP", lossless=True), 32), pixels)


@pytest.mark.parametrize("size", [(64, 64), (200, 50), (51, 133), (9, 9), (1000, 700)])
def test_any_shape_becomes_a_square(size):
    out = decode_image(encode(Image.new("RGB", size, (10, 200, 30))), 32)
    assert out.shape == (32, 32, 3)
    assert out.dtype == np.uint8
    assert (out == (10, 200, 30)).all()


def test_crop_is_central():
    wide = Image.new("RGB", (96, 32), "black")
    wide.paste((255, 255, 255), (32, 0, 64, 32))
    assert (decode_image(encode(wide), 32) == 255).all()


def test_big_jpeg_through_draft_keeps_the_picture():
    out = decode_image(encode(halves(1600, 1600, (200, 20, 20), (20, 20, 200)), "JPEG", quality=95), 32).astype(int)
    assert np.abs(out[:, :14] - (200, 20, 20)).max() < 8
    assert np.abs(out[:, 18:] - (20, 20, 200)).max() < 8


def test_one_bit():
    image = Image.new("1", (32, 32))
    image.paste(1, (16, 0, 32, 32))
    out = decode_image(encode(image), 32)
    assert (out[:, :16] == 0).all()
    assert (out[:, 16:] == 255).all()


def test_sixteen_bit_grey_is_scaled_not_saturated():
    grey = np.linspace(0, 65535, 32 * 32).astype(np.uint16).reshape(32, 32)
    out = decode_image(encode(Image.fromarray(grey)), 32)
    assert np.abs(out[..., 0].astype(float) - grey / 257).max() <= 0.5
    assert (out[..., 0] == out[..., 2]).all()


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P"])
def test_transparent_pixels_are_white(mode):
    image = Image.new("RGBA", (32, 32), (200, 0, 0, 0))
    image.paste((0, 0, 0, 255), (16, 0, 32, 32))
    options = {}
    if mode == "P":
        image, options = Image.new("P", (32, 32)), {"transparency": 0}
        image.putpalette([200, 0, 0, 0, 0, 0])
        image.paste(1, (16, 0, 32, 32))
    out = decode_image(encode(image if mode == "P" else image.convert(mode), **options), 32)
    assert (out[:, :16] == 255).all()
    assert (out[:, 16:] == 0).all()


def test_half_transparent():
    out = decode_image(encode(Image.new("RGBA", (32, 32), (0, 0, 0, 128))), 32)
    assert np.abs(out.astype(int) - 127).max() <= 1


def test_cmyk():
    out = decode_image(encode(Image.new("CMYK", (32, 32), (0, 255, 255, 0)), "JPEG", quality=100), 32).astype(int)
    assert np.abs(out - (255, 0, 0)).max() < 6


def test_exif_rotation():
    exif = Image.Exif()
    exif[0x0112] = 6  # to be shown turned clockwise: the left side becomes the top
    out = decode_image(encode(halves(64, 64, 0, 255), exif=exif), 32)
    assert (out[:12] < 30).all()
    assert (out[20:] > 225).all()


@pytest.mark.filterwarnings("ignore:Corrupt EXIF")
def test_broken_exif_is_no_reason():
    jpeg = encode(Image.new("RGB", (32, 32), "white"), "JPEG", exif=b"Exif\0\0II*\0\xff\xff\xff\xff broken")
    assert (decode_image(jpeg, 32) == 255).all()


def test_animation_gives_its_first_frame():
    frames = [Image.new("RGB", (32, 32), colour) for colour in ("white", "black")]
    data = encode(frames[0], "WEBP", save_all=True, append_images=frames[1:], lossless=True)
    assert (decode_image(data, 32) == 255).all()


@pytest.mark.parametrize("size", [(30_000, 30_000), (9_000, 9_000), (20_000, 100), (12_000, 6_000)])
def test_bomb_is_refused_by_its_header(size):
    assert reason(png_header(*size)) == "too_many_pixels"


@pytest.mark.parametrize("size", [(1, 1), (4, 400)])
def test_too_small(size):
    assert reason(encode(Image.new("RGB", size))) == "too_small"


@pytest.mark.parametrize("format", ["GIF", "BMP", "TIFF", "PPM"])
def test_other_formats_are_refused(format):
    assert reason(encode(Image.new("RGB", (32, 32)), format)) == "not_an_image"


@pytest.mark.parametrize("data", [b"", b"<html>404</html>", b"\x89PNG\r\n\x1a\n"])
def test_no_image(data):
    assert reason(data) in ("not_an_image", "decode_error")


@pytest.mark.parametrize("format", ["PNG", "JPEG", "WEBP"])
def test_truncated_raises(format):
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8))
    whole = encode(noise, format)
    assert reason(whole[: len(whole) * 2 // 3]) in ("decode_error", "not_an_image")


def test_bit_flip_never_escapes():
    """Whatever a damaged file makes Pillow raise, it is a bad sample or a picture."""
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (16, 16, 3), np.uint8))
    rng = np.random.default_rng(1)
    outcomes = set()
    for format in ("PNG", "JPEG", "WEBP"):
        whole = encode(noise, format)
        for _ in range(300):
            data = bytearray(whole)
            data[rng.integers(len(data))] ^= 1 << rng.integers(8)
            try:
                outcomes.add(decode_image(bytes(data), 16).shape)
            except BadSample as bad:
                outcomes.add(bad.reason)
    assert (16, 16, 3) in outcomes
    assert outcomes & set(REASONS)
