"""The embedded pictures: one or two coloured shapes on a coloured ground, rendered here from a seed, with captions.

64x64, anti-aliased by signed distance; eight shapes, eight colours, eight grounds, two sizes, nine places. Eight
(colour, shape) pairs, one of each colour and each shape, never appear in training: the held-out compositions.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

SIZE = 64
COLOURS = {
    "red": (220, 38, 38),
    "orange": (247, 140, 20),
    "yellow": (250, 222, 50),
    "green": (34, 160, 70),
    "blue": (40, 90, 225),
    "purple": (140, 45, 185),
    "pink": (250, 130, 190),
    "brown": (125, 75, 40),
}
GROUNDS = {
    "white": (250, 250, 250),
    "black": (15, 15, 18),
    "gray": (128, 128, 128),
    "navy": (22, 32, 84),
    "beige": (236, 222, 188),
    "mint": (180, 236, 206),
    "sky": (170, 214, 246),
    "teal": (10, 110, 112),
}
SIZES = {"small": (6.0, 9.5), "big": (13.0, 20.0)}  # radius in pixels: half the longer side of the bounding box
PLACES = ("top left", "top", "top right", "left", "center", "right", "bottom left", "bottom", "bottom right")
PLACE_CENTRES = (20.0, 32.0, 44.0)
PLACE_EDGES = (26.0, 38.0)
RELATIONS = ("above", "below", "left of", "right of")


def _star(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    y = y * 0.95 - 0.095  # the bounding box of a five-pointed star is not centred on its circle
    x = x * 0.95
    angle = np.abs((np.arctan2(x, -y) + np.pi / 5) % (2 * np.pi / 5) - np.pi / 5)
    radius = np.hypot(x, y)
    px, py = radius * np.cos(angle) - 1.0, radius * np.sin(angle)
    inner = 0.42
    ex, ey = inner * np.cos(np.pi / 5) - 1.0, inner * np.sin(np.pi / 5)
    return (px * ey - py * ex) / np.hypot(ex, ey) / 0.95


def _heart(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    x, y = np.abs(x) * 0.6, 0.53 - y * 0.6
    lobe = np.hypot(x - 0.25, y - 0.75) - np.sqrt(2) / 4
    corner = np.maximum(x + y, 0.0) * 0.5
    rest = np.minimum(np.hypot(x, y - 1.0), np.hypot(x - corner, y - corner)) * np.sign(x - y)
    return np.where(x + y > 1.0, lobe, rest) / 0.6


# Signed distances to shapes whose bounding box is centred and reaches 1; x to the right, y down.
SHAPES = {
    "circle": lambda x, y: np.hypot(x, y) - 1.0,
    "square": lambda x, y: np.maximum(np.abs(x), np.abs(y)) - 1.0,
    "triangle": lambda x, y: np.maximum(y - 0.87, (np.abs(x) * 1.74 - y - 0.87) / 2.007),
    "star": _star,
    "ring": lambda x, y: np.abs(np.hypot(x, y) - 0.74) - 0.26,
    "cross": lambda x, y: np.minimum(
        np.maximum(np.abs(x) - 1.0, np.abs(y) - 0.34), np.maximum(np.abs(x) - 0.34, np.abs(y) - 1.0)
    ),
    "diamond": lambda x, y: (np.abs(x) / 0.72 + np.abs(y) - 1.0) / np.hypot(1 / 0.72, 1.0),
    "heart": _heart,
}
# One pair of every colour and every shape: a Latin diagonal, so that each word is still seen in seven other pairs.
HELD_OUT = frozenset((colour, list(SHAPES)[(3 * i + 2) % 8]) for i, colour in enumerate(COLOURS))


@dataclass(frozen=True)
class Thing:
    """One object of a scene; centre and radius in pixels."""

    shape: str
    colour: str
    size: str
    x: float
    y: float
    radius: float


@dataclass(frozen=True)
class Scene:
    """What a picture shows. `relation` says where the first object stands from the second; `place` is a single
    one's.
    """

    things: tuple[Thing, ...]
    ground: str
    place: str | None = None
    relation: str | None = None

    def attributes(self) -> dict[str, Any]:
        """The scene as the plain dictionary that travels in a sample's .json member."""
        return asdict(self)


def _pair(rng: np.random.Generator, held_out: bool) -> tuple[str, str]:
    while True:
        colour, shape = list(COLOURS)[rng.integers(8)], list(SHAPES)[rng.integers(8)]
        if ((colour, shape) in HELD_OUT) == held_out:
            return colour, shape


def one(rng: np.random.Generator, held_out: bool = False) -> Scene:
    """A scene of one object at one of the nine places, jittered by up to 3 pixels."""
    colour, shape = _pair(rng, held_out)
    size = list(SIZES)[rng.integers(2)]
    radius, place = rng.uniform(*SIZES[size]), int(rng.integers(9))
    low, high = radius + 1.0, SIZE - 1.0 - radius
    x, y = (min(max(PLACE_CENTRES[k] + rng.uniform(-3, 3), low), high) for k in (place % 3, place // 3))
    return Scene((Thing(shape, colour, size, x, y, radius),), _ground(rng), place=PLACES[place])


def two(rng: np.random.Generator) -> Scene:
    """A scene of two objects of different colours, side by side or one above the other, at least 3 pixels apart."""
    while True:
        pairs = [_pair(rng, False) for _ in range(2)]
        if pairs[0][0] != pairs[1][0]:
            break
    sizes = [list(SIZES)[rng.integers(2)] for _ in range(2)]
    while True:
        radii = [rng.uniform(*SIZES[size]) for size in sizes]
        slack = SIZE - 5.0 - 2 * sum(radii)
        if slack >= 0:
            break
    gaps = np.diff([0.0, *sorted(rng.uniform(0, slack, 2)), slack])
    along = (1.0 + gaps[0] + radii[0], SIZE - 1.0 - gaps[2] - radii[1])
    across = [min(max(32.0 + rng.uniform(-6, 6), r + 1.0), SIZE - 1.0 - r) for r in radii]
    relation = RELATIONS[rng.integers(4)]
    if relation in ("below", "right of"):
        along = (SIZE - 1.0 - gaps[2] - radii[0], 1.0 + gaps[0] + radii[1])
    centres = [(across[i], along[i]) if relation in ("above", "below") else (along[i], across[i]) for i in range(2)]
    things = tuple(Thing(s, c, size, *xy, r) for (c, s), size, xy, r in zip(pairs, sizes, centres, radii))
    return Scene(things, _ground(rng), relation=relation)


def _ground(rng: np.random.Generator) -> str:
    return list(GROUNDS)[rng.integers(8)]


def render(scenes: Sequence[Scene]) -> np.ndarray:
    """Pictures of scenes, uint8 (N, 64, 64, 3); coverage = 1/2 - distance in pixels, clipped."""
    canvas = np.empty((len(scenes), SIZE, SIZE, 3), np.float32)
    canvas[:] = np.array([GROUNDS[scene.ground] for scene in scenes], np.float32)[:, None, None]
    centre = np.arange(SIZE, dtype=np.float32) + 0.5
    for shape, distance in SHAPES.items():
        hits = [(i, thing) for i, scene in enumerate(scenes) for thing in scene.things if thing.shape == shape]
        for i, thing in hits:
            lo_x, hi_x = (max(int(thing.x - thing.radius - 2), 0), int(thing.x + thing.radius + 3))
            lo_y, hi_y = (max(int(thing.y - thing.radius - 2), 0), int(thing.y + thing.radius + 3))
            x = ((centre[lo_x:hi_x] - thing.x) / thing.radius)[None, :]
            y = ((centre[lo_y:hi_y] - thing.y) / thing.radius)[:, None]
            coverage = np.clip(0.5 - distance(x, y) * thing.radius, 0.0, 1.0)[..., None]
            patch = canvas[i, lo_y:hi_y, lo_x:hi_x]
            patch += coverage * (np.array(COLOURS[thing.colour], np.float32) - patch)
    return np.round(canvas).astype(np.uint8)


_SIZE_WORDS = {"small": ("small", "small", "little", "tiny"), "big": ("big", "big", "large", "huge")}
_GROUND_WORDS = ("background", "background", "ground", "backdrop")
_PLACE_WORDS = {
    "top left": ("in the top left", "in the upper left corner"),
    "top": ("at the top", "in the top middle"),
    "top right": ("in the top right", "in the upper right corner"),
    "left": ("on the left", "at the left side"),
    "center": ("in the center", "in the middle"),
    "right": ("on the right", "at the right side"),
    "bottom left": ("in the bottom left", "in the lower left corner"),
    "bottom": ("at the bottom", "in the bottom middle"),
    "bottom right": ("in the bottom right", "in the lower right corner"),
}
_RELATION_WORDS = {
    "above": ("above", "over"),
    "below": ("below", "under"),
    "left of": ("to the left of", "left of"),
    "right of": ("to the right of", "right of"),
}


def caption(scene: Scene, rng: np.random.Generator) -> str:
    """A caption that names everything about the scene, in one of several wordings."""

    def pick(options: Sequence[str]) -> str:
        return options[rng.integers(len(options))]

    names = [f"a {pick(_SIZE_WORDS[t.size])} {t.colour} {t.shape}" for t in scene.things]
    ground = f"{scene.ground} {pick(_GROUND_WORDS)}"
    if scene.relation is None:
        where = pick(_PLACE_WORDS[scene.place or ""])
        forms = ("{0} {1} on a {2}", "{0} on a {2}, {1}", "on a {2}, {0} {1}", "a picture of {0} {1} on a {2}")
        return pick(forms).format(names[0], where, ground)
    relation = pick(_RELATION_WORDS[scene.relation])
    forms = (
        "{0} {1} {3} on a {2}",
        "on a {2}, {0} {1} {3}",
        "a picture of {0} {1} {3} on a {2}",
        "{0} is {1} {3}, on a {2}",
    )
    return pick(forms).format(names[0], relation, ground, names[1])


def scenes(kind: str, seed: int, count: int) -> Iterator[tuple[Scene, str]]:
    """Scenes and captions of one kind: "mixed" (half with one object, half with two) or "held_out" compositions."""
    for i in range(count):
        rng = np.random.Generator(np.random.Philox(key=[seed * 2 + (kind == "held_out"), i]))
        scene = one(rng, held_out=True) if kind == "held_out" else (one(rng) if i % 2 == 0 else two(rng))
        yield scene, caption(scene, rng)


class Shapes:
    """These pictures as `rendered.py` writes them."""

    name, size = "shapes-v1", SIZE
    draw, render = staticmethod(scenes), staticmethod(render)


class Vocabulary:
    """The words of these pictures and what they mean in pixels; the config gives it to `metric/caption_match.py`."""

    colours, grounds, sizes = COLOURS, GROUNDS, SIZES
    places, place_edges, relations = PLACES, PLACE_EDGES, RELATIONS
    shapes = tuple(SHAPES)
    distance_extent = 1.5

    def distances(self, resolution: int) -> np.ndarray:
        """Each shape's signed distance at the cell centres of a grid over [-extent, extent]^2, float32 (8, R, R)."""
        grid = ((np.arange(resolution) + 0.5) / resolution * 2 - 1) * self.distance_extent
        return np.stack([distance(grid[None, :], grid[:, None]) for distance in SHAPES.values()]).astype(np.float32)
