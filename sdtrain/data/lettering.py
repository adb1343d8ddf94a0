"""Embedded pictures of words: one to three in coloured letters, one a line, rendered here from a seed, with captions.

64x64, anti-aliased by distance to strokes; 26 capitals of one width, so that a word's box tells how many letters it
has. A word is a common one or a string of random letters; some common ones never appear in training: the held-out
words.

Captions quote the words spelt out, `the words "C A T" and "M O O N" in red on white`. A tokenizer learned from captions
would make one token of CAT and hide its letters; with a token a letter, a word that was never seen is told in the same
tokens as any other. For the same reason no other word of a caption is a single letter: tokenizers of lower case could
not tell the article from an A.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import cache
from typing import Any

import numpy as np

from sdtrain.data.scene import COLOURS, GROUNDS, SIZE

HEIGHTS = tuple(11.0 + 0.5 * i for i in range(7))  # of capitals, in pixels
WIDTH, GAP, STROKE = 0.7, 0.18, 0.17  # of a letter, between letters, of a line: shares of the height
MARGIN = 2.0  # pixels at the picture's edge that stay free
LINE_GAPS = (4.0, 6.0)  # pixels between lines
JITTER = 6.0  # pixels that a line stands off the centre at most, and so the whole
MIN_LETTERS, MAX_LETTERS, MAX_WORDS = 2, 5, 3
MIN_CONTRAST = 35.0  # of brightness (Rec. 601 luma, 0 to 255): red on teal has 12 and is hard to read
LUMA = (0.299, 0.587, 0.114)
LEGIBLE = tuple(
    (colour, ground)
    for colour, ink in COLOURS.items()
    for ground, paper in GROUNDS.items()
    if abs(np.dot(np.subtract(ink, paper), LUMA)) >= MIN_CONTRAST
)

COMMON = tuple(
    """
    AM AN AS AT BE BY DO GO HE IF IN IS IT ME MY NO OF ON OR OX SO TO UP US WE
    ACE ADD AGE AIR ANT APE ARM ART ASH BAD BAG BAT BED BEE BIG BOX BOY BUS BUY CAP CAR CAT COW CRY CUP CUT DAY DIG DOG
    DRY EAR EAT EGG END EYE FAN FAR FIG FIX FLY FOG FOX FUN GAS GYM HAT HEN HOT ICE INK JAM JAR JET JOB JOY KEY KID LEG
    LIP LOG MAP MIX MUD NET NUT OAK OIL OWL PAN PEN PIG RAT RED RUN SEA SKY SUN TAX TEA TOY VAN VET WAX WEB ZIP ZOO
    AQUA BABY BACK BALL BANK BEAR BIRD BLUE BOAT BOOK CAKE CAVE CITY COLD CORN CUBE DARK DEEP DESK DOOR DUCK EAST EASY
    EXIT FACE FARM FIRE FISH FIVE FROG GAME GATE GIFT GOAT GOLD HAND HERO HILL HOME IDEA IRON JAZZ JUMP KING KITE LAKE
    LAMB LEAF LION LOVE MILK MOON NECK NEST NOSE OPEN OVEN PARK POEM POND QUIZ RAIN RING ROAD ROSE SAND SHIP SNOW SOUP
    STAR TENT TREE TUBE VASE VIEW WAVE WIND WOLF WOOD YARD YEAR ZERO ZONE
    APPLE BEACH BREAD BRICK CHAIR CLOUD CRANE DANCE DREAM EAGLE EARTH FLAME FRUIT GHOST GLASS GRAPE GREEN HAPPY HEART
    HONEY HORSE HOUSE JELLY JUICE KNIFE LEMON LIGHT MAGIC MONEY MOUSE MUSIC NIGHT OCEAN PAPER PIANO PLANT QUEEN QUIET
    RIVER ROBOT SHEEP SMILE STONE SUGAR TABLE TIGER TRAIN VOICE WATER WHALE WORLD YOUNG ZEBRA
    """.split()
)
HELD_OUT = COMMON[4::8]
SEEN = tuple(word for word in COMMON if word not in HELD_OUT)

Stroke = list[tuple[float, float]]


def _arc(x: float, y: float, rx: float, ry: float, start: float, stop: float) -> Stroke:
    """Points of an ellipse between two angles in degrees, clockwise from the right where they rise."""
    angles = np.radians(np.linspace(start, stop, 2 + int(abs(stop - start) / 15)))
    return list(zip((x + rx * np.cos(angles)).tolist(), (y + ry * np.sin(angles)).tolist()))


_BOWL = [(0.0, 1.0), (0.0, 0.0), *_arc(0.5, 0.27, 0.5, 0.27, -90, 90), (0.0, 0.54)]
_RING = _arc(0.5, 0.5, 0.5, 0.5, 0, 360)
# The middle of every line, x to the right and y down, in a box of side 1 that each letter fills from edge to edge.
GLYPHS: dict[str, list[Stroke]] = {
    "A": [[(0, 1), (0.5, 0), (1, 1)], [(0.17, 0.66), (0.83, 0.66)]],
    "B": [
        [(0, 0.47), (0, 0), *_arc(0.5, 0.235, 0.42, 0.235, -90, 90), (0, 0.47)],
        [(0, 0.47), *_arc(0.5, 0.735, 0.5, 0.265, -90, 90), (0, 1), (0, 0.47)],
    ],
    "C": [_arc(0.56, 0.5, 0.56, 0.5, -45, -315)],
    "D": [[(0, 0), *_arc(0.3, 0.5, 0.7, 0.5, -90, 90), (0, 1), (0, 0)]],
    "E": [[(1, 0), (0, 0), (0, 1), (1, 1)], [(0, 0.5), (0.8, 0.5)]],
    "F": [[(1, 0), (0, 0), (0, 1)], [(0, 0.5), (0.8, 0.5)]],
    "G": [[*_arc(0.5, 0.5, 0.5, 0.5, -45, -360), (0.55, 0.5)]],
    "H": [[(0, 0), (0, 1)], [(1, 0), (1, 1)], [(0, 0.5), (1, 0.5)]],
    "I": [[(0, 0), (1, 0)], [(0.5, 0), (0.5, 1)], [(0, 1), (1, 1)]],
    "J": [[(1, 0), *_arc(0.5, 0.65, 0.5, 0.35, 0, 180)]],
    "K": [[(0, 0), (0, 1)], [(1, 0), (0, 0.58)], [(0.36, 0.37), (1, 1)]],
    "L": [[(0, 0), (0, 1), (1, 1)]],
    "M": [[(0, 1), (0, 0), (0.5, 0.6), (1, 0), (1, 1)]],
    "N": [[(0, 1), (0, 0), (1, 1), (1, 0)]],
    "O": [_RING],
    "P": [_BOWL],
    "Q": [_RING, [(0.55, 0.6), (1, 1)]],
    "R": [_BOWL, [(0.4, 0.54), (1, 1)]],
    "S": [[*_arc(0.5, 0.25, 0.5, 0.25, -20, -270), *_arc(0.5, 0.75, 0.5, 0.25, -90, 160)]],
    "T": [[(0, 0), (1, 0)], [(0.5, 0), (0.5, 1)]],
    "U": [[(0, 0), *_arc(0.5, 0.62, 0.5, 0.38, 180, 0), (1, 0)]],
    "V": [[(0, 0), (0.5, 1), (1, 0)]],
    "W": [[(0, 0), (0.2, 1), (0.5, 0.4), (0.8, 1), (1, 0)]],
    "X": [[(0, 0), (1, 1)], [(1, 0), (0, 1)]],
    "Y": [[(0, 0), (0.5, 0.5), (1, 0)], [(0.5, 0.5), (0.5, 1)]],
    "Z": [[(0, 0), (1, 0), (0, 1), (1, 1)]],
}
LETTERS = "".join(GLYPHS)


@cache
def glyph(letter: str, height: float, x: float, y: float, num_rows: int, num_columns: int) -> np.ndarray:
    """How much of each pixel a letter covers whose box begins at (x, y), float32 (rows, columns)."""
    half = STROKE * height / 2
    scale = np.array([WIDTH * height - 2 * half, height - 2 * half])
    strokes = [np.array(stroke) * scale + half + (x, y) for stroke in GLYPHS[letter]]
    start, end = (np.concatenate([points[part] for points in strokes]) for part in np.s_[:-1, 1:])
    way = (end - start)[:, None, None]  # (S, 1, 1, 2): a segment's
    across, down = np.meshgrid(np.arange(num_columns) + 0.5, np.arange(num_rows) + 0.5)
    offset = np.stack([across, down], axis=-1) - start[:, None, None]  # (S, rows, columns, 2)
    along = ((offset * way).sum(-1) / (way**2).sum(-1).clip(1e-12)).clip(0, 1)
    nearest = np.linalg.norm(offset - along[..., None] * way, axis=-1).min(0)
    return np.clip(0.5 + half - nearest, 0, 1).astype(np.float32)


@dataclass(frozen=True)
class Word:
    """One word; x and y are its box's left and top edges in pixels."""

    text: str
    x: float
    y: float


@dataclass(frozen=True)
class Lettering:
    """What a picture shows: words from top to bottom, all in one colour and of one height in pixels."""

    things: tuple[Word, ...]
    colour: str
    ground: str
    height: float

    def attributes(self) -> dict[str, Any]:
        """The picture as the plain dictionary that travels in a sample's .json member."""
        return asdict(self)


def word_width(num_letters: int, height: float) -> float:
    """Of a word's box, in pixels."""
    return (num_letters * (WIDTH + GAP) - GAP) * height


def _snap(value: float) -> float:
    """To quarters of a pixel, so that few drawings serve all pictures."""
    return round(4 * value) / 4


def _word(rng: np.random.Generator) -> str:
    """A common word that training may show, or as often a string of random letters that is no held-out word."""
    if rng.integers(2):
        return SEEN[rng.integers(len(SEEN))]
    while True:
        letters = rng.integers(len(LETTERS), size=rng.integers(MIN_LETTERS, MAX_LETTERS + 1))
        text = "".join(LETTERS[i] for i in letters)
        if text not in HELD_OUT:
            return text


def _placed(rng: np.random.Generator, centre: float, extent: float) -> float:
    """Where something begins that stands near a centre and off the picture's edges."""
    start = centre + rng.uniform(-JITTER, JITTER) - extent / 2
    return _snap(min(max(start, MARGIN), SIZE - MARGIN - extent))


def written(texts: Sequence[str], rng: np.random.Generator) -> Lettering:
    """A picture of these words in some size, places, colour and ground."""
    height, gap = HEIGHTS[rng.integers(len(HEIGHTS))], rng.uniform(*LINE_GAPS)
    top = _placed(rng, SIZE / 2, len(texts) * (height + gap) - gap)
    words = []
    for i, text in enumerate(texts):
        left = _placed(rng, SIZE / 2, word_width(len(text), height))
        words.append(Word(text, left, _snap(top + i * (height + gap))))
    return Lettering(tuple(words), *LEGIBLE[rng.integers(len(LEGIBLE))], height)


def render(pictures: Sequence[Lettering]) -> np.ndarray:
    """Pictures of words, uint8 (N, 64, 64, 3)."""
    coverage = np.zeros((len(pictures), SIZE, SIZE, 1), np.float32)
    for plane, picture in zip(coverage[..., 0], pictures):
        height = picture.height
        num_rows, num_columns = int(height) + 2, int(WIDTH * height) + 3
        for word in picture.things:
            top = int(word.y)
            for i, letter in enumerate(word.text):
                x = _snap(word.x + i * (WIDTH + GAP) * height)
                left = int(x)
                patch = plane[top : top + num_rows, left : left + num_columns]
                drawn = glyph(letter, height, x - left, word.y - top, num_rows, num_columns)
                np.maximum(patch, drawn[: patch.shape[0], : patch.shape[1]], out=patch)
    inks = np.array([COLOURS[picture.colour] for picture in pictures], np.float32)[:, None, None]
    papers = np.array([GROUNDS[picture.ground] for picture in pictures], np.float32)[:, None, None]
    return np.round(papers + coverage * (inks - papers)).astype(np.uint8)


def caption(picture: Lettering, rng: np.random.Generator) -> str:
    """A caption that quotes the words letter by letter and names the colours, in one of several wordings."""
    quoted = [f'"{" ".join(word.text)}"' for word in picture.things]
    listed = " and ".join([", ".join(quoted[:-1]), quoted[-1]] if len(quoted) > 1 else quoted)
    noun = "words" if len(quoted) > 1 else "word"
    forms = (
        "the {noun} {listed} in {ink} on {paper}",
        "{listed} written in {ink} on {paper}",
        "{ink} letters on {paper} that say {listed}",
        "on {paper}, the {noun} {listed} in {ink}",
    )
    form = forms[rng.integers(len(forms))]
    return form.format(noun=noun, listed=listed, ink=picture.colour, paper=picture.ground)


def letterings(kind: str, seed: int, count: int) -> Iterator[tuple[Lettering, str]]:
    """Pictures and captions of one kind: "mixed" (of one, two and three words in turn) or "held_out" (of one word)."""
    for i in range(count):
        rng = np.random.Generator(np.random.Philox(key=[seed * 2 + (kind == "held_out"), i]))
        if kind == "held_out":
            texts = [HELD_OUT[rng.integers(len(HELD_OUT))]]
        else:
            texts = [_word(rng) for _ in range(1 + i % MAX_WORDS)]
        picture = written(texts, rng)
        yield picture, caption(picture, rng)


class Words:
    """These pictures as `rendered.py` writes them."""

    name, size = "words-v1", SIZE
    draw, render = staticmethod(letterings), staticmethod(render)


class Vocabulary:
    """The letters and colours of these pictures, and how they look; the config gives it to `metric/spelling.py`."""

    letters, heights, colours, grounds = LETTERS, HEIGHTS, COLOURS, GROUNDS
    width, gap = WIDTH, GAP

    def glyphs(self, height: float, x: float, y: float, num_rows: int, num_columns: int) -> np.ndarray:
        """Every letter, its box beginning at (x, y), as the share of each pixel that it covers, (26, rows, columns)."""
        return np.stack([glyph(letter, height, x, y, num_rows, num_columns) for letter in self.letters])
