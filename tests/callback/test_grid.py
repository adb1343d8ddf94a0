"""The drawing of captioned pictures."""

import numpy as np
import pytest
from PIL import Image, ImageFont

from sdtrain.callback.grid import FONT_PIXELS, MAX_LINES, draw_grid, wrap
from sdtrain.contracts import Preview


def constant(num_images, height, width):
    return np.stack([np.full((height, width, 3), 10 * (index + 1), np.uint8) for index in range(num_images)])


def test_small_pictures_grow_by_a_whole_factor_and_large_ones_stay():
    assert draw_grid(Preview(constant(4, 64, 64), [""] * 4, 2)).size == (2 * 138 + 10, 2 * 138 + 10)
    assert draw_grid(Preview(constant(1, 50, 70), [""], 8)).size == (210 + 20, 150 + 20)
    assert draw_grid(Preview(constant(2, 200, 300), [], 1)).size == (320, 2 * 210 + 10)


def test_every_picture_is_at_its_place_in_reading_order():
    pixels = np.asarray(draw_grid(Preview(constant(5, 128, 128), [""] * 5, 3)))
    centres = [pixels[10 + 138 * row + 64, 10 + 138 * column + 64, 0] for row in range(2) for column in range(3)]
    assert centres == [10, 20, 30, 40, 50, 255]


def test_the_caption_stands_under_its_picture_and_nowhere_else():
    captions = ["a small red star above a big blue ring on a white background", ""]
    pixels = np.asarray(draw_grid(Preview(constant(2, 64, 64), captions, 2)))
    assert pixels.shape[0] > 128 + 20 + 3 * 15
    assert pixels[140:, :138].min() < 100
    assert pixels[140:, 148:].min() == 255


@pytest.mark.parametrize(
    "caption",
    ["short", "a small red star above a big blue ring " * 3, "x" * 90, "word " * 500, "\n\t", "日本語 ☃ \x00"],
)
def test_lines_fit_and_are_few(caption):
    font = ImageFont.load_default(FONT_PIXELS)
    lines = wrap(caption, 128, font)
    assert len(lines) <= MAX_LINES
    assert all(font.getlength(line) <= 128 for line in lines)
    whole = "".join(caption.split())
    if "".join(lines) != whole.replace(" ", "") and " ".join(lines).split() != caption.split():
        assert lines[-1].endswith("...")
        assert whole.startswith("".join("".join(lines).split())[:-3])


def test_a_megabyte_of_caption_is_quick():
    draw_grid(Preview(constant(1, 64, 64), ["x" * 1_000_000], 1))


@pytest.mark.parametrize(
    "images", [np.zeros((0, 8, 8, 3), np.uint8), np.zeros((1, 3, 8, 8), np.uint8), np.zeros((1, 8, 8, 3))]
)
def test_what_is_not_a_preview_is_refused(images):
    with pytest.raises(ValueError, match="a preview is uint8"):
        draw_grid(Preview(images, [], 1))


def test_the_drawing_is_a_picture_that_can_be_read_back(tmp_path):
    draw_grid(Preview(constant(2, 64, 64), ["a", "b"], 2)).save(tmp_path / "grid.png")
    assert Image.open(tmp_path / "grid.png").mode == "RGB"
