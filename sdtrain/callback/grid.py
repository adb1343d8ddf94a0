"""Pictures in rows with their captions under them, as one picture."""

from __future__ import annotations

import math
from bisect import bisect_right

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from sdtrain.contracts import Preview

MIN_CELL_PIXELS = 128
FONT_PIXELS = 13
LINE_PIXELS = 17
GAP_PIXELS = 10
MAX_LINES = 4
MAX_CAPTION_CHARACTERS = 400
BACKGROUND, INK = (255, 255, 255), (40, 44, 52)


def draw_grid(preview: Preview) -> Image.Image:
    """The preview as an RGB picture. Small pictures are enlarged by a whole factor to at least 128 pixels."""
    images = np.asarray(preview.images)  # (N, H, W, 3)
    if images.ndim != 4 or images.shape[-1] != 3 or images.dtype != np.uint8 or not len(images):
        raise ValueError(f"a preview is uint8 (N, H, W, 3) with N > 0, this one is {images.dtype} {images.shape}")
    num_images, height, width, _ = images.shape
    columns = max(1, min(preview.columns, num_images))
    factor = math.ceil(MIN_CELL_PIXELS / min(height, width)) if min(height, width) < MIN_CELL_PIXELS else 1
    cell_width, cell_height = width * factor, height * factor

    font = ImageFont.load_default(FONT_PIXELS)
    captions = (list(preview.captions) + [""] * num_images)[:num_images]
    lines = [wrap(caption, cell_width, font) for caption in captions]
    rows = [range(start, min(start + columns, num_images)) for start in range(0, num_images, columns)]
    text_heights = [max(len(lines[index]) for index in row) * LINE_PIXELS for row in rows]

    size = (
        columns * (cell_width + GAP_PIXELS) + GAP_PIXELS,
        sum(cell_height + text_height + GAP_PIXELS for text_height in text_heights) + GAP_PIXELS,
    )
    canvas = Image.new("RGB", size, BACKGROUND)
    draw = ImageDraw.Draw(canvas)
    top = GAP_PIXELS
    for row, text_height in zip(rows, text_heights):
        for column, index in enumerate(row):
            left = GAP_PIXELS + column * (cell_width + GAP_PIXELS)
            picture = Image.fromarray(images[index])
            canvas.paste(picture.resize((cell_width, cell_height), Image.Resampling.BICUBIC), (left, top))
            for number, line in enumerate(lines[index]):
                draw.text((left, top + cell_height + 2 + number * LINE_PIXELS), line, fill=INK, font=font)
        top += cell_height + text_height + GAP_PIXELS
    return canvas


def wrap(caption: str, width_pixels: int, font: ImageFont.FreeTypeFont) -> list[str]:
    """The caption in at most `MAX_LINES` lines that fit; a longer one ends in an ellipsis, a longer word is cut."""
    lines: list[str] = []
    line = ""
    for word in caption[:MAX_CAPTION_CHARACTERS].split():
        candidate = f"{line} {word}" if line else word
        if font.getlength(candidate) <= width_pixels:
            line = candidate
            continue
        if line:
            lines.append(line)
        while font.getlength(word) > width_pixels:
            end = _fitting(word, width_pixels, font)
            lines.append(word[:end])
            word = word[end:]
        line = word
    if line:
        lines.append(line)
    if len(lines) <= MAX_LINES and len(caption) <= MAX_CAPTION_CHARACTERS:
        return lines
    lines = lines[:MAX_LINES]
    while lines[-1] and font.getlength(lines[-1] + "...") > width_pixels:
        lines[-1] = lines[-1][:-1]
    return [*lines[:-1], lines[-1] + "..."]


def _fitting(word: str, width_pixels: int, font: ImageFont.FreeTypeFont) -> int:
    """How many characters of the word fit, at least one."""
    num_fitting = bisect_right(range(1, len(word)), width_pixels, key=lambda end: font.getlength(word[:end]))
    return max(1, num_fitting)
