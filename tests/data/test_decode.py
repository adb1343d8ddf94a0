"""Every sort of picture becomes uint8 RGB of the size asked for, or a reason. The references are made without ours."""

import io
import itertools
import struct
import subprocess
import sys
import zlib

import numpy as np
import pytest
from PIL import Image, ImageDraw, JpegImagePlugin

from sdtrain.data import decode
from sdtrain.data.bad_sample import REASONS, BadSample
from sdtrain.data.decode import decode_image


def encode(image, format="PNG", **options):
    buffer = io.BytesIO()
    image.save(buffer, format, **options)
    return buffer.getvalue()


def square(data, side=32, **options):
    return decode_image(data, side, side, **options).pixels


def reason(data):
    with pytest.raises(BadSample) as error:
        decode_image(data, 32, 32)
    assert error.value.reason in REASONS
    return error.value.reason


def scene(width, height, seed=0):
    """As photographs are: amplitudes fall with the frequency, and there are edges."""
    rng = np.random.default_rng(seed)
    frequency = np.hypot(np.fft.fftfreq(height)[:, None], np.fft.fftfreq(width)[None])
    frequency[0, 0] = 1
    noise = np.fft.fft2(rng.standard_normal((4, height, width))) / frequency**1.2
    grey, *tints = np.fft.ifft2(noise).real
    planes = [128 + 45 * grey / grey.std() + 15 * tint / tint.std() for tint in tints]
    image = Image.fromarray(np.stack(planes, axis=-1).clip(0, 255).astype(np.uint8))
    draw = ImageDraw.Draw(image)
    for _ in range(40):
        x, y, r = rng.integers(width), rng.integers(height), min(int(6 * rng.pareto(1.5)) + 4, width // 4)
        draw.ellipse((x - r, y - r, x + r, y + r), fill=tuple(rng.integers(0, 256, 3).tolist()))
    return image


def slack(image, height, width):
    """What stands out, in the picture's own pixels, and how many of them a pixel of the target is wide."""
    factor = min(image.height / height, image.width / width)
    return (image.height - height * factor, image.width - width * factor), factor


def reference(image, height, width, start):
    """The long way: decoded whole, cut at `start` (its own pixels), scaled with Lanczos."""
    _, factor = slack(image, height, width)
    top, left = (int(place) for place in start)
    image = image.convert("RGB").crop((left, top, image.width, image.height))
    rows, columns = start[0] - top, start[1] - left
    box = (columns, rows, min(columns + width * factor, image.width), min(rows + height * factor, image.height))
    return np.asarray(image.resize((width, height), Image.Resampling.LANCZOS, box=box)).astype(int)


def lanczos(image, height, width, start):
    """The same in double precision, by its formula; rows first, in whole levels between, as everybody has it."""
    _, factor = slack(image, height, width)
    pixels = np.asarray(image)[start[0] :, start[1] :].astype(float)
    for axis, count in ((1, width), (0, height)):
        away = (np.arange(pixels.shape[axis]) + 0.5 - (np.arange(count) + 0.5)[:, None] * factor) / max(factor, 1)
        weights = np.where(np.abs(away) < 3, np.sinc(away) * np.sinc(away / 3), 0)
        weights /= weights.sum(axis=1, keepdims=True)
        pixels = np.moveaxis(np.tensordot(weights, pixels, (1, axis)), 0, axis).round().clip(0, 255)
    return pixels


def likeness(pixels, image, crop=(0.5, 0.5), part=1):
    """Decibels to the long way, where the crop may stand a pixel of the decoded picture off, which has 1 / part."""
    height, width = pixels.shape[:2]
    room, _ = slack(image, height, width)
    steps = np.arange(-part, part + 0.1, 0.5)
    places = [{min(max(r * c + step, 0), max(r, 0)) for step in steps} for r, c in zip(room, crop)]
    return max(decibels(pixels, reference(image, height, width, start)) for start in itertools.product(*places))


def decibels(pixels, wanted):
    return 10 * np.log10(255**2 / max(np.square(pixels.astype(float) - wanted).mean(), 1e-9))


def png(depth, colour, rows, *chunks):
    """A PNG of any colour type and depth, without Pillow."""

    def chunk(name, data):
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    size = struct.pack(">II", len(rows[0]) * 8 // depth // {0: 1, 2: 3, 4: 2, 6: 4}[colour], len(rows))
    head = chunk(b"IHDR", size + bytes([depth, colour, 0, 0, 0]))
    body = chunk(b"IDAT", zlib.compress(b"".join(b"\0" + row for row in rows)))
    return b"\x89PNG\r\n\x1a\n" + head + b"".join(chunk(*c) for c in chunks) + body + chunk(b"IEND", b"")


def png_header(width, height):
    """A PNG that claims a size and has no pixels."""
    head = b"IHDR" + struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + struct.pack(">I", 13) + head + struct.pack(">I", zlib.crc32(head)) + b"\0\0\0\0IDAT"


@pytest.mark.parametrize("format", ["PNG", "WEBP"])
def test_same_size_is_bit_exact(format):
    pixels = np.random.default_rng(0).integers(0, 256, (24, 32, 3), np.uint8)
    data = encode(Image.fromarray(pixels), format, lossless=True)
    out = decode_image(data, 24, 32)
    assert out.pixels.dtype == np.uint8
    assert out.pixels.flags.c_contiguous
    assert np.array_equal(out.pixels, pixels)
    assert out[1:] == ((24, 32), (0, 0))


@pytest.mark.parametrize("size", [(64, 64), (200, 50), (51, 133), (9, 9), (49, 98), (4000, 9), (9, 4000)])
def test_any_shape_fills_the_target(size):
    out = decode_image(encode(Image.new("RGB", size, (10, 200, 30))), 40, 32)
    assert out.pixels.shape == (40, 32, 3)
    assert (out.pixels == (10, 200, 30)).all()
    assert out.original_size == size[::-1]


@pytest.mark.parametrize(("width", "height"), [(300, 200), (201, 333), (97, 61), (1500, 100), (64, 65)])
@pytest.mark.parametrize("target", [(64, 64), (48, 80)])
def test_lossless_is_the_formula_to_within_two_levels(width, height, target):
    image = scene(width, height)
    room, factor = slack(image, *target)
    start = [(int(pixels) + 1) // 2 for pixels in room]
    out = decode_image(encode(image), *target)
    off = np.abs(out.pixels - lanczos(image, *target, start))
    assert off.max() <= 2
    assert off.mean() < 0.1
    assert out.crop_top_left == tuple(round(place / factor) for place in start)


@pytest.mark.parametrize("options", [{"quality": 90}, {"quality": 85, "progressive": True}, {"subsampling": 0}])
@pytest.mark.parametrize(
    ("size", "side", "part"),
    [((1024, 768), 256, 2), ((511, 383), 128, 2), ((381, 509), 64, 4), ((1111, 200), 67, 2), ((805, 801), 67, 8)],
)
def test_jpeg_decoded_smaller_looks_like_the_whole(size, side, part, options):
    data = encode(scene(*size), "JPEG", **options)
    assert likeness(square(data, side), Image.open(io.BytesIO(data)), part=part) >= 38


def test_jpeg_is_decoded_smaller_but_never_too_small(monkeypatch):
    sizes, load = [], JpegImagePlugin.JpegImageFile.load
    monkeypatch.setattr(JpegImagePlugin.JpegImageFile, "load", lambda self: (sizes.append(self.size), load(self))[1])
    data, found = encode(scene(1024, 768), "JPEG"), {}
    for side in (300, 256, 150, 130, 60):
        square(data, side)
        found[side] = sizes[-1]
    assert found == {300: (1024, 768), 256: (512, 384), 150: (512, 384), 130: (256, 192), 60: (128, 96)}


def test_crop_goes_from_edge_to_edge():
    image = scene(96, 32)
    data = encode(image)
    for crop, left in ((0.0, 0), (0.25, 16), (0.5, 32), (0.999, 64), (1.0, 64)):
        out = decode_image(data, 32, 32, (0.7, crop))
        assert out.crop_top_left == (0, left)
        assert np.array_equal(out.pixels, np.asarray(image)[:, left : left + 32])
    assert {decode_image(data, 31, 93, (y, 0)).crop_top_left[0] for y in (0, 0.5, 1)} == {0}
    assert [decode_image(data, 8, 96, (y, 0)).crop_top_left[0] for y in (0, 0.5, 1)] == [0, 12, 24]


@pytest.mark.parametrize("crop", [(0.0, 0.0), (0.3, 0.8), (1.0, 1.0)])
@pytest.mark.parametrize("target", [(64, 64), (80, 40), (40, 90)])
def test_crop_and_flip_of_a_large_jpeg(crop, target):
    data = encode(scene(801, 599), "JPEG", quality=95)
    whole = Image.open(io.BytesIO(data)).convert("RGB")
    room, factor = slack(whole, *target)
    for flip in (False, True):
        out = decode_image(data, *target, crop, flip)
        shown = whole.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if flip else whole
        assert likeness(out.pixels, shown, crop, 8) >= 38
        assert np.abs(np.array(out.crop_top_left) - np.array(room) * crop / factor).max() <= 1


def test_every_place_of_the_crop_is_as_likely():
    data = encode(Image.new("RGB", (19, 16)))
    places = [decode_image(data, 16, 16, (0, (i + 0.5) / 400)).crop_top_left[1] for i in range(400)]
    assert np.bincount(places).tolist() == [100] * 4


TURNED = {  # what EXIF says of the stored picture, undone
    1: lambda a: a,
    2: lambda a: a[:, ::-1],
    3: lambda a: a[::-1, ::-1],
    4: lambda a: a[::-1],
    5: lambda a: a.transpose(1, 0, 2),
    6: lambda a: np.rot90(a, 1),
    7: lambda a: a.transpose(1, 0, 2)[::-1, ::-1],
    8: lambda a: np.rot90(a, -1),
}


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("format", ["JPEG", "PNG", "WEBP"])
def test_every_orientation(orientation, format):
    """Stored as the camera held it, shown upright: crop, flip and sizes count in what is shown."""
    exif = Image.Exif()
    exif[0x0112] = orientation
    upright = scene(371, 233)
    stored = Image.fromarray(np.ascontiguousarray(TURNED[orientation](np.asarray(upright))))
    options = {"quality": 95, "subsampling": 0} if format == "JPEG" else {"lossless": True}
    data = encode(stored, format, exif=exif, **options)
    for flip in (False, True):
        shown = upright.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if flip else upright
        out = decode_image(data, 48, 64, (0.9, 0.2), flip)
        assert out.original_size == (233, 371)
        assert out.crop_top_left in ((0, 2), (0, 3))
        assert likeness(out.pixels, shown, (0.9, 0.2), 2 if format == "JPEG" else 1) >= 37
        assert likeness(out.pixels[:, ::-1], shown, (0.9, 0.2)) < 25


@pytest.mark.filterwarnings("ignore:Corrupt EXIF")
@pytest.mark.parametrize("format", ["JPEG", "PNG", "WEBP"])
@pytest.mark.parametrize("exif", [b"II*\0\xff\xff\xff\xff broken", b"", b"MM\0*", b"MM\0*" + b"\xff" * 40, b"no TIFF"])
def test_broken_exif_leaves_the_picture_as_it_is(exif, format):
    image = scene(64, 48)
    options = {"quality": 98, "subsampling": 0} if format == "JPEG" else {"lossless": True}
    data = encode(image, format, exif=b"Exif\0\0" + exif, **options)
    assert decibels(decode_image(data, 48, 64).pixels, np.asarray(image)) > 30


def test_one_bit():
    image = Image.new("1", (32, 32))
    image.paste(1, (16, 0, 32, 32))
    out = square(encode(image))
    assert (out[:, :16] == 0).all()
    assert (out[:, 16:] == 255).all()


@pytest.mark.parametrize("depth", [1, 2, 4, 8])
def test_few_bits_of_grey_use_the_whole_range(depth):
    levels = np.arange(32) % 2**depth
    bits = np.unpackbits(levels.astype(np.uint8)[:, None], axis=1)[:, 8 - depth :]
    out = square(png(depth, 0, [np.packbits(bits).tobytes()] * 32))
    assert np.array_equal(out[0, :, 1], levels * (255 // (2**depth - 1)))


def test_sixteen_bit_grey_is_scaled_not_saturated():
    grey = np.linspace(0, 65535, 32 * 32).astype(np.uint16).reshape(32, 32)
    out = square(encode(Image.fromarray(grey)))
    assert np.abs(out[..., 0].astype(float) - grey / 257).max() <= 0.5
    assert (out[..., 0] == out[..., 2]).all()


def test_sixteen_bit_colour():
    words = np.random.default_rng(0).integers(0, 65536, (32, 32, 3))
    out = square(png(16, 2, [row.astype(">u2").tobytes() for row in words]))
    assert np.abs(out - words / 257).max() <= 1


def over(colour, alpha, ground):
    return (colour * alpha + ground * (255 - alpha)) / 255


@pytest.mark.parametrize("ground", [(255, 255, 255), (0, 0, 0), (200, 30, 90)])
@pytest.mark.parametrize("mode", ["RGBA", "LA", "P", "PA", "RGB key"])
def test_what_is_transparent_shows_the_ground(mode, ground):
    rng = np.random.default_rng(0)
    colour, alpha = rng.integers(0, 256, (32, 32, 3)), rng.integers(0, 256, (32, 32, 1))
    if mode == "RGBA":
        data = encode(Image.fromarray(np.concatenate((colour, alpha), axis=2).astype(np.uint8)))
    elif mode == "LA":
        colour = colour[..., :1]
        data = encode(Image.fromarray(np.concatenate((colour, alpha), axis=2).astype(np.uint8), "LA"))
    elif mode == "RGB key":  # one colour is said to be transparent
        colour[::2] = key = (9, 8, 7)
        alpha = np.where((colour == key).all(axis=2, keepdims=True), 0, 255)
        data = encode(Image.fromarray(colour.astype(np.uint8)), transparency=key)
    else:
        place, palette = rng.integers(0, 16, (32, 32)), rng.integers(0, 256, (16, 3))
        opacity = np.array([0] + [255] * 15) if mode == "P" else rng.integers(0, 256, 16)
        image = Image.fromarray(place.astype(np.uint8), "P")
        image.putpalette(palette.flatten().tolist())
        data = encode(image, transparency=0 if mode == "P" else bytes(opacity.tolist()))
        colour, alpha = palette[place], opacity[place][..., None]
    assert np.abs(square(data, ground=ground) - over(colour, alpha, np.array(ground))).max() <= 1


def test_transparent_pixels_lend_no_colour_to_their_neighbours():
    image = Image.new("RGBA", (128, 128), (255, 0, 0, 0))
    image.paste((0, 0, 0, 255), (63, 0, 128, 128))
    out = square(encode(image)).astype(int)
    assert np.abs(out - out[..., :1]).max() == 0


@pytest.mark.parametrize("is_ycck", [False, True])
def test_cmyk(is_ycck):
    ink = np.random.default_rng(0).integers(0, 256, (4, 4, 4)).astype(np.uint8).repeat(16, 0).repeat(16, 1)
    options = {"quality": 100, "subsampling": 0}
    data = encode(Image.fromarray(ink, "CMYK"), "JPEG", **options)
    marker = data.index(b"\xff\xee")
    assert data[marker + 4 : marker + 9] == b"Adobe"  # its values are stored inverted
    if is_ycck:  # as Photoshop writes them: cyan, magenta and yellow as if they were red, green and blue
        planes = [*Image.fromarray(ink[..., :3]).convert("YCbCr").split(), Image.fromarray(255 - ink[..., 3])]
        stored = [Image.eval(plane, lambda value: 255 - value) for plane in planes]
        data = bytearray(encode(Image.merge("CMYK", stored), "JPEG", **options))
        data[marker + 15] = 2
    cyan_magenta_yellow, black = ink[..., :3].astype(int), ink[..., 3:].astype(int)
    wanted = (255 - cyan_magenta_yellow) * (255 - black) / 255
    assert np.abs(square(bytes(data), 64)[8::16, 8::16] - wanted[8::16, 8::16]).max() <= 4


@pytest.mark.parametrize("format", ["WEBP", "PNG", "MPO"])
def test_of_several_pictures_the_first_is_taken(format):
    frames = [Image.new("RGB", (512, 512), colour) for colour in ("white", "black")]
    data = encode(frames[0], format, save_all=True, append_images=frames[1:])
    assert (square(data) == 255).all()


@pytest.mark.parametrize("size", [(30_000, 30_000), (9_000, 9_000), (20_000, 100), (12_000, 6_000), (4_500, 4_500)])
def test_bomb_is_refused_by_its_header(size):
    assert reason(png_header(*size)) == "too_many_pixels"


@pytest.mark.slow
def test_bombs_take_no_memory():
    """Real ones, whole, that would be 268 MB and more of pixels."""
    code = """
import io, sys
from PIL import Image
from sdtrain.data.bad_sample import BadSample
from sdtrain.data.decode import decode_image
from sdtrain.ops.memory import peak_memory_bytes
data = sys.stdin.buffer.read()
decode_image(data[:int(sys.argv[1])], 32, 32)
before = peak_memory_bytes()
for start, stop in zip(map(int, sys.argv[1:]), map(int, sys.argv[2:])):
    try:
        decode_image(data[start:stop], 32, 32)
    except BadSample as bad:
        print(bad.reason)
print((peak_memory_bytes() - before) >> 20)
"""
    whole = [encode(scene(640, 480), "JPEG")]
    whole += [encode(Image.new("1", (side, side)), "PNG") for side in (8_200, 16_000)]
    whole += [encode(Image.new("L", (8_100, 8_100)), "JPEG"), encode(Image.new("1", (60_000, 1_000)), "PNG")]
    ends = np.cumsum([len(data) for data in whole]).astype(str)
    done = subprocess.run([sys.executable, "-c", code, *ends], input=b"".join(whole), capture_output=True, check=True)
    *reasons, megabytes = done.stdout.decode().split()
    assert reasons == ["too_many_pixels"] * 4
    assert int(megabytes) < 20


@pytest.mark.slow
def test_the_largest_pictures_take_less_than_200_megabytes():
    code = """
import sys
from sdtrain.data.decode import decode_image
from sdtrain.ops.memory import peak_memory_bytes
data = sys.stdin.buffer.read()
decode_image(data[:int(sys.argv[1])], 512, 512)
for start, stop in zip(map(int, sys.argv[1:]), map(int, sys.argv[2:])):
    before = peak_memory_bytes()
    decode_image(data[start:stop], 512, 512)
    print((peak_memory_bytes() - before) >> 20)
"""
    ramp = Image.linear_gradient("L")
    # each is held to what those before it took, so the largest come last
    whole = [encode(Image.merge("RGB", [ramp.resize((700, 700))] * 3), "JPEG")]
    whole += [encode(ramp.resize((8_000, 8_000)), "JPEG", progressive=True)]
    whole += [encode(Image.merge("RGBA", [ramp.resize((4_470, 4_470))] * 4), compress_level=1)]
    whole += [encode(Image.merge("RGB", [ramp.resize((2_990, 2_990))] * 3), "WEBP", quality=10, method=0)]
    ends = np.cumsum([len(data) for data in whole]).astype(str)
    done = subprocess.run([sys.executable, "-c", code, *ends], input=b"".join(whole), capture_output=True, check=True)
    more = [int(line) for line in done.stdout.split()]
    assert sum(more) < 200
    assert sum(more) > 100  # they were decoded


@pytest.mark.parametrize("size", [(1, 1), (4, 400)])
def test_too_small(size):
    assert reason(encode(Image.new("RGB", size))) == "too_small"


def test_too_many_bytes():
    assert reason(encode(Image.new("RGB", (32, 32))) + bytes(32 << 20)) == "image_too_large"


@pytest.mark.parametrize("format", ["GIF", "BMP", "TIFF", "PPM", "AVIF", "JPEG2000", "ICO"])
def test_other_formats_are_refused(format):
    assert reason(encode(Image.new("RGB", (32, 32)), format)) == "not_an_image"


@pytest.mark.parametrize("data", [b"", b"<html>404</html>", b"\x89PNG\r\n\x1a\n"])
def test_no_image(data):
    assert reason(data) in ("not_an_image", "decode_error")


@pytest.mark.parametrize("format", ["PNG", "JPEG", "WEBP"])
@pytest.mark.parametrize("part", [0.1, 0.5, 0.9])
def test_cut_off(format, part):
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (256, 256, 3), np.uint8))
    whole = encode(noise, format)
    assert reason(whole[: int(len(whole) * part)]) in ("decode_error", "not_an_image")


def test_bit_flip_never_escapes():
    """Whatever a damaged file makes Pillow raise, it is a bad sample or a picture."""
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (16, 16, 4), np.uint8))
    palette = noise.convert("RGB").quantize(16)
    rng = np.random.default_rng(1)
    outcomes = set()
    for image, format in ((noise, "PNG"), (palette, "PNG"), (noise.convert("RGB"), "JPEG"), (noise, "WEBP")):
        whole = encode(image, format)
        for _ in range(300):
            data = bytearray(whole)
            data[rng.integers(len(data))] ^= 1 << rng.integers(8)
            try:
                outcomes.add(square(bytes(data), 16).shape)
            except BadSample as bad:
                outcomes.add(bad.reason)
    assert (16, 16, 3) in outcomes
    assert outcomes & set(REASONS)


def test_running_out_of_memory_is_no_bad_sample(monkeypatch):
    def load(_self):
        raise MemoryError

    monkeypatch.setattr("PIL.ImageFile.ImageFile.load", load)
    with pytest.raises(MemoryError):
        square(encode(Image.new("RGB", (32, 32))))


@pytest.mark.parametrize("size", [(128, 96), (64, 111)])
def test_a_large_picture_is_resized_in_strips(monkeypatch, size):
    data = encode(scene(301, 203))
    whole = Image.open(io.BytesIO(data))
    (down, across), factor = slack(whole, *size)
    top, left = (int(down) + 1) // 2, (int(across) + 1) // 2
    box = (left, top, min(left + size[1] * factor, 301), min(top + size[0] * factor, 203))
    expected = np.asarray(whole.resize(size[::-1], Image.Resampling.LANCZOS, box=box)).astype(int)
    monkeypatch.setattr(decode, "_MAX_COPIED_PIXELS", 1000)
    monkeypatch.setattr(decode, "_STRIP_ROWS", 7)
    assert np.abs(decode_image(data, *size).pixels - expected).max() <= 1


def test_several_scans_are_seen():
    image, exif = scene(64, 64), Image.Exif()
    exif[0x010E] = b"a thumbnail: \xff\xda"
    whole = encode(image, "JPEG")
    assert not decode._has_several_scans(whole, 3)
    assert not decode._has_several_scans(encode(image, "JPEG", exif=exif), 3)
    assert not decode._has_several_scans(encode(image.convert("L"), "JPEG"), 1)
    assert decode._has_several_scans(encode(image, "JPEG", progressive=True), 3)
    start = whole.index(b"\xff\xda") + 4
    assert decode._has_several_scans(whole[:start] + b"\1" + whole[start + 1 :], 3)
    assert decode._has_several_scans(whole[:20], 3)  # nobody knows


def test_a_jpeg_whose_coefficients_are_kept_is_held_to_its_memory(monkeypatch):
    monkeypatch.setattr(decode, "MAX_DECODING_BYTES", 500_000)
    image = scene(400, 400)
    assert reason(encode(image, "JPEG", progressive=True, subsampling=0)) == "too_many_pixels"
    assert square(encode(image, "JPEG", progressive=True, subsampling=2), 16).shape == (16, 16, 3)
    assert square(encode(image, "JPEG", subsampling=0)).shape == (32, 32, 3)
    with pytest.raises(BadSample, match="decoding takes"):
        decode_image(encode(image, "JPEG"), 20, 20, is_whole=True)
    assert decode_image(encode(image, "JPEG"), 300, 300).pixels.shape == (300, 300, 3)  # as large a target may
