"""Does the picture spell what its caption quotes? A reader of capitals, colour and ground, trained on nothing.

It knows what each letter looks like. A pixel's ink is how far it is from the ground towards the colour furthest from
it; rows with ink are lines; a line's box tells how many letters it has, since all are of one width; each letter is the
one whose drawing, somewhere near its place, at some height and softness, correlates most with the picture there.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any, NamedTuple, Protocol

import numpy as np
from typing_extensions import override

from sdtrain.errors import ConfigError
from sdtrain.metric.reader import Reader, blur

FIGURES = ("letter", "word", "colour", "ground")
MIN_CONTRAST = 40.0  # between ground and ink, in RGB; less is an empty picture
NUM_INK_PIXELS = 20  # two letters have more that are nothing but ink
INK_SHARES = (0.7, 1.05)  # how much of its colour soft ink may have
MIN_LINE_PIXELS = 6  # rows of a line; fewer are a speck
MAX_MISFIT = 0.3  # of the variance around a letter that its best drawing leaves; a solid block has 0.35, more is none
HEIGHT_ERROR = 1.0  # pixels; a line that no height of the vocabulary is so near to has no letters
EXTRA_HEIGHT = 1.0  # pixels that drawings go beyond the vocabulary's heights
PHASES = (0.0, 0.5)  # parts of a pixel that a letter is moved by when it is drawn
MOVES = (-1, 0, 1)  # pixels that a letter may stand off its place in its line
BLURS_PIXELS = (0.0, 0.7, 1.2)  # letters are compared sharp and blurred, as a decoder makes them
BORDER = 1  # pixel around a letter's box that is compared with it; more would reach its neighbours
PAD = 24  # pixels of nothing around a picture, so that every place can be compared
UNKNOWN = "?"


class Vocabulary(Protocol):
    """What the pictures can show. Colours are RGB in [0, 255]; width and gap are shares of a letter's height."""

    letters: str
    heights: Sequence[float]
    colours: Mapping[str, tuple[int, int, int]]
    grounds: Mapping[str, tuple[int, int, int]]
    width: float
    gap: float

    def glyphs(self, height: float, x: float, y: float, num_rows: int, num_columns: int) -> np.ndarray: ...


class Drawings(NamedTuple):
    """Every letter at one height, in every phase and softness."""

    pixels: np.ndarray  # (T, rows x columns), each of mean 0 and length 1
    letters: np.ndarray  # (T,) which of the letters
    shape: tuple[int, int]


class Spelling(Reader):
    """Reads pictures and scores them against attributes, the dictionaries that travel in the samples' .json members."""

    # Name, split, number of words: the stage takes the captions of each group from there.
    groups = (("one", "val", 1), ("two", "val", 2), ("three", "val", 3), ("heldout", "held_out", 1))

    def __init__(self, vocabulary: Vocabulary, num_captions: int = 256) -> None:
        if num_captions < 2:
            raise ConfigError(f"spelling.num_captions is {num_captions}; shuffled captions need at least 2")
        self.num_captions = num_captions
        self.vocabulary = vocabulary
        self._colours = np.array(list(vocabulary.colours.values()), np.float32)
        self._grounds = np.array(list(vocabulary.grounds.values()), np.float32)

    @override
    def read(self, images: np.ndarray) -> list[dict[str, Any]]:
        """What uint8 pictures (N, H, W, 3) show: "things" (text, x, y) from top to bottom, "colour" and "ground".

        A letter that is none is "?"; a picture without ink has no things and no colour.
        """
        return [self._read(image.astype(np.float32)) for image in images]

    @override
    def shares(self, readings: Sequence[Mapping[str, Any]], wanted: Sequence[Mapping[str, Any]]) -> dict[str, float]:
        """Shares in [0, 1]: of the pictures that are right in "all", and of what is right alone.

        "letter" counts the captions' letters that stand in their places, in the line and in the word; "word" the
        captions' words that are read whole on their lines; "colour" and "ground" pictures.
        """
        letters, words, colours, grounds, whole = [], [], [], [], []
        for reading, attributes in zip(readings, wanted):
            read, told = ([thing["text"] for thing in shown["things"]] for shown in (reading, attributes))
            lines = read + [""] * (len(told) - len(read))
            letters += [a == b for line, text in zip(lines, told) for a, b in zip(line.ljust(len(text)), text)]
            words += [line == text for line, text in zip(lines, told)]
            colours.append(reading["colour"] == attributes["colour"])
            grounds.append(reading["ground"] == attributes["ground"])
            whole.append(read == told and colours[-1] and grounds[-1])
        shares = {name: float(np.mean(met)) for name, met in zip(FIGURES, (letters, words, colours, grounds))}
        return {"all": float(np.mean(whole)), **shares}

    def _read(self, pixels: np.ndarray) -> dict[str, Any]:
        """One picture, (H, W, 3)."""
        sides = pixels[:2], pixels[-2:], pixels[:, :2], pixels[:, -2:]
        ground = np.median(np.concatenate([side.reshape(-1, 3) for side in sides]), axis=0)
        offset = pixels - ground
        distance = np.linalg.norm(offset, axis=-1)  # (H, W)
        nearest = np.linalg.norm(self._grounds - ground, axis=1).argmin()
        reading = {"ground": list(self.vocabulary.grounds)[nearest], "colour": None, "things": []}
        far = np.partition(distance, -NUM_INK_PIXELS, axis=None)[-NUM_INK_PIXELS]
        ink = offset[distance >= 0.9 * far].mean(0)
        if np.linalg.norm(ink) < MIN_CONTRAST:
            return reading
        reading["colour"] = self._colour(ground, ink)
        alpha = np.pad((offset @ ink / (ink @ ink)).clip(0, 1), PAD)
        lines = _runs((alpha > 0.5).any(1), MIN_LINE_PIXELS)
        reading["things"] = [self._line(alpha, top, bottom) for top, bottom in lines]
        return reading

    def _colour(self, ground: np.ndarray, ink: np.ndarray) -> str:
        """The name of a colour, from what soft ink of it adds to the ground."""
        full = self._colours - ground  # (8, 3)
        share = (full @ ink / (full**2).sum(1).clip(1.0)).clip(*INK_SHARES)
        return list(self.vocabulary.colours)[np.linalg.norm(share[:, None] * full - ink, axis=1).argmin()]

    def _line(self, alpha: np.ndarray, top: int, bottom: int) -> dict[str, Any]:
        """The word whose ink stands between two rows."""
        columns = np.flatnonzero((alpha[top:bottom] > 0.5).any(0))
        y, height = _extent(alpha[:, columns].max(1), top, bottom)
        x, length = _extent(alpha[top:bottom].max(0), int(columns[0]), int(columns[-1]) + 1)
        width, gap = self.vocabulary.width, self.vocabulary.gap
        num_letters = max(round((length / height + gap) / (width + gap)), 1)
        pitch = (length + gap * height) / num_letters
        closeness, letters = np.zeros(num_letters), np.zeros(num_letters, int)
        for drawn in (drawn for h, drawn in self._drawings.items() if abs(h - height) <= HEIGHT_ERROR):
            rows, cols = (np.arange(side) for side in drawn.shape)
            place_y = np.array([round(y) - BORDER + move for move in MOVES])
            place_x = np.array([[round(x + i * pitch) - BORDER + move for move in MOVES] for i in range(num_letters)])
            row = (place_y[:, None] + rows)[None, :, None, :, None]
            column = (place_x[..., None] + cols)[:, None, :, None, :]
            patches = alpha[row, column].reshape(num_letters, len(MOVES) ** 2, -1)  # (letters, moves, pixels)
            patches -= patches.mean(-1, keepdims=True)  # with the mean left in, a blot would pass for a B
            patches /= np.linalg.norm(patches, axis=-1, keepdims=True).clip(1.0)
            correlation = (patches @ drawn.pixels.T).max(1)  # (letters, T)
            found = correlation.max(1)
            letters = np.where(found > closeness, drawn.letters[correlation.argmax(1)], letters)
            closeness = np.maximum(found, closeness)
        known = closeness**2 >= 1 - MAX_MISFIT
        text = "".join(self.vocabulary.letters[k] if ok else UNKNOWN for k, ok in zip(letters, known))
        return {"text": text, "x": float(x) - PAD, "y": float(y) - PAD}

    @cached_property
    def _drawings(self) -> dict[float, Drawings]:
        low, high = min(self.vocabulary.heights) - EXTRA_HEIGHT, max(self.vocabulary.heights) + EXTRA_HEIGHT
        return {h: self._draw(h) for h in np.arange(low, high + 0.25, 0.5).tolist()}

    def _draw(self, height: float) -> Drawings:
        rows, columns = (int(np.ceil(side)) + 2 * BORDER for side in (height, self.vocabulary.width * height))
        sharp = np.concatenate(
            [self.vocabulary.glyphs(height, BORDER + x, BORDER + y, rows, columns) for y in PHASES for x in PHASES]
        )
        drawn = np.concatenate([blur(rows, sigma) @ sharp @ blur(columns, sigma) for sigma in BLURS_PIXELS])
        pixels = drawn.reshape(len(drawn), -1)  # (T, rows x columns)
        pixels = pixels - pixels.mean(1, keepdims=True)
        letters = np.tile(np.arange(len(self.vocabulary.letters)), len(PHASES) ** 2 * len(BLURS_PIXELS))
        return Drawings(pixels / np.linalg.norm(pixels, axis=1, keepdims=True), letters, (rows, columns))


def _extent(profile: np.ndarray, start: int, stop: int) -> tuple[float, float]:
    """Where something begins and how long it is, to parts of a pixel, from the most ink in each row or column."""
    before, after = (profile[i - 1] + profile[i] for i in (start, stop))
    return start + 1 - before, stop - start - 2 + before + after


def _runs(mask: np.ndarray, least: int) -> list[tuple[int, int]]:
    """Where runs of True of some length begin and end."""
    edges = np.flatnonzero(np.diff(np.concatenate([[False], mask, [False]])))
    return [(int(a), int(b)) for a, b in zip(edges[::2], edges[1::2]) if b - a >= least]
