"""The reader of letters on rendered words: its ceiling, its floor, each figure, and what it must not read."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hydra import compose, initialize_config_dir
from hydra.utils import instantiate

from sdtrain.data import lettering, scene
from sdtrain.data.lettering import Lettering, Word, letterings, render
from sdtrain.errors import ConfigError
from sdtrain.metric.spelling import FIGURES, Spelling

CONFIGS = Path(__file__).parents[2] / "configs"
NUM_WORDS = {"one": 1, "two": 2, "three": 3}


@pytest.fixture(scope="module")
def reader():
    return Spelling(lettering.Vocabulary())


def pictures_of(kind, count=150):
    if kind == "heldout":
        return [shown for shown, _ in letterings("held_out", 11, count)]
    return [shown for shown, _ in letterings("mixed", 11, 3 * count) if len(shown.things) == NUM_WORDS[kind]]


def attributes_of(pictures):
    return [shown.attributes() for shown in pictures]


def blurred(images, sigma, noise):
    weight = np.exp(-0.5 * (np.arange(-4, 5, dtype=np.float32) / sigma) ** 2)
    soft = np.pad(images.astype(np.float32), ((0, 0), (4, 4), (4, 4), (0, 0)), mode="edge")
    for axis in (1, 2):
        soft = sum(w * np.take(soft, range(i, i + 64), axis) for i, w in enumerate(weight / weight.sum()))
    soft = soft + np.random.default_rng(0).uniform(-noise, noise, soft.shape)
    return soft.round().clip(0, 255).astype(np.uint8)


@pytest.mark.parametrize("kind", ["one", "two", "three", "heldout"])
@pytest.mark.parametrize(
    ("sigma", "noise", "least"),
    [(None, 0, 0.99), (0.7, 8, 0.98), (1.0, 10, 0.97), (1.3, 12, 0.85)],
    ids=["sharp", "blurred", "more blurred", "very blurred"],
)
def test_it_reads_real_and_softened_pictures(reader, kind, sigma, noise, least):
    pictures = pictures_of(kind, 100 if sigma else 200)
    images = render(pictures)
    score = reader.score(blurred(images, sigma, noise) if sigma else images, attributes_of(pictures))
    print(f"{kind}, blur {sigma}, noise {noise}: {score}")
    assert score["all"] >= least
    assert min(score.values()) == score["all"]


@pytest.mark.parametrize("letter", lettering.LETTERS)
def test_every_letter_at_every_height_and_in_every_place(reader, letter):
    heights = [h for h in lettering.HEIGHTS for _ in range(4)]
    words = [
        Word(letter * (2 + i % 4), 2.0 + 0.25 * (i % 3), 2.0 + (i % 8) + 0.25 * (i % 4)) for i in range(len(heights))
    ]
    pictures = [Lettering((word,), "black", "white", h) for word, h in zip(words, heights)]
    pictures = [replace(shown, colour="blue") for shown in pictures]
    read = [[thing["text"] for thing in reading["things"]] for reading in reader.read(render(pictures))]
    assert read == [[word.text] for word in words]


def test_a_reading_has_the_words_in_pixels(reader):
    shown = Lettering((Word("MOON", 7.5, 10.25), Word("UP", 30.0, 33.5)), "green", "black", 12.5)
    (reading,) = reader.read(render([shown]))
    assert (reading["colour"], reading["ground"]) == ("green", "black")
    assert [thing["text"] for thing in reading["things"]] == ["MOON", "UP"]
    for thing, word in zip(reading["things"], shown.things):
        assert (thing["x"], thing["y"]) == pytest.approx((word.x, word.y), abs=0.3)


def picture(*texts, colour="red", ground="white"):
    return Lettering(tuple(Word(text, 3.0, 4.0 + 18 * i) for i, text in enumerate(texts)), colour, ground, 12.0)


@pytest.mark.parametrize(
    ("drawn", "letter", "word"),
    [
        (picture("CAT", "MOON"), 1.0, 1.0),
        (picture("CAR", "MOON"), 6 / 7, 0.5),  # one letter wrong
        (picture("CATS", "MOON"), 1.0, 0.5),  # one letter too many
        (picture("CA", "MOON"), 6 / 7, 0.5),  # one missing at the end
        (picture("AT", "MOON"), 4 / 7, 0.5),  # one missing at the start: none of the others is in its place
        (picture("CAT"), 3 / 7, 0.5),  # a line is missing
        (picture("CAT", "MOON", "SUN"), 1.0, 1.0),  # a line too many: the picture is wrong, the words are right
        (picture("MOON", "CAT"), 0.0, 0.0),  # changed places
    ],
    ids=lambda value: "-".join(w.text for w in value.things) if isinstance(value, Lettering) else None,
)
def test_letters_and_words_count_in_their_places(reader, drawn, letter, word):
    wanted = picture("CAT", "MOON")
    score = reader.score(render([drawn]), attributes_of([wanted]))
    assert score == {
        "all": float(drawn == wanted),
        "letter": pytest.approx(letter),
        "word": word,
        "colour": 1.0,
        "ground": 1.0,
    }


@pytest.mark.parametrize("attribute", ["colour", "ground"])
def test_a_wrong_colour_or_ground_is_wrong(reader, attribute):
    drawn, wanted = picture("CAT", colour="blue", ground="beige"), picture("CAT", colour="blue", ground="beige")
    wanted = replace(wanted, **{attribute: {"colour": "purple", "ground": "mint"}[attribute]})
    score = reader.score(render([drawn]), attributes_of([wanted]))
    assert score == {"all": 0.0} | {name: float(name != attribute) for name in FIGURES}


def test_what_is_no_lettering_has_no_letters(reader):
    noise = np.random.default_rng(3).integers(0, 256, (8, 64, 64, 3)).astype(np.uint8)
    empty = np.full_like(noise, 250)
    stripes = np.where(np.arange(64)[:, None] % 8 < 4, 0, 255).astype(np.uint8)[None, :, :, None].repeat(3, -1)
    stripes = np.broadcast_to(stripes, noise.shape)
    shapes = scene.render([shown for shown, _ in scene.scenes("mixed", 0, 64)])
    for images in (noise, empty, stripes, stripes.swapaxes(1, 2)):
        assert "".join(thing["text"] for shown in reader.read(images) for thing in shown["things"]).strip("?") == ""
    read = "".join(thing["text"] for shown in reader.read(shapes) for thing in shown["things"])
    assert len(read.replace("?", "")) <= 0.02 * len(read)
    assert reader.score(empty[:1], attributes_of([picture("CAT", ground="white")])) == {
        "all": 0.0,
        "letter": 0.0,
        "word": 0.0,
        "colour": 0.0,
        "ground": 1.0,
    }


def test_faint_letters_and_letters_of_another_size_are_none(reader):
    (image,) = render([picture("CAT", colour="blue")])
    faint = (250 + 0.15 * (image.astype(np.float32) - 250)).round().astype(np.uint8)
    assert reader.read(faint[None])[0] == {"ground": "white", "colour": None, "things": []}
    large = image.repeat(2, 0).repeat(2, 1)[:64, :64]
    assert {letter for thing in reader.read(large[None])[0]["things"] for letter in thing["text"]} == {"?"}


def test_a_blot_is_no_letter_and_a_speck_no_line(reader):
    (image,) = render([picture("CAT")])
    image[40:43, 30:60] = lettering.COLOURS["red"]  # a speck of three rows
    assert [thing["text"] for thing in reader.read(image[None])[0]["things"]] == ["CAT"]
    image[48:60, 10:30] = lettering.COLOURS["red"]  # a block of a line's height
    assert [thing["text"] for thing in reader.read(image[None])[0]["things"]] == ["CAT", "??"]


def test_ink_at_the_edges_is_read_without_an_error(reader):
    images = np.full((4, 64, 64, 3), 250, np.uint8)
    images[0, :20, 10:30] = 0
    images[1, 44:, 40:] = 0
    images[2, 20:] = 0
    images[3, 8:15] = 0
    for reading in reader.read(images):
        assert {len(thing["text"].strip("?")) for thing in reading["things"]} <= {0}


def test_the_report_has_every_group_and_its_limits(reader):
    groups = {}
    for kind in ("one", "two", "three", "heldout"):
        pictures = pictures_of(kind, 32)
        images = render(pictures)
        groups[kind] = {
            "real": images,
            "attributes": attributes_of(pictures),
            "reconstructions": blurred(images, 0.7, 8),
            "samples": np.concatenate([images[:24], images[:8]]),  # a quarter is wrong
        }
    report = reader.report(groups)
    assert set(report) == {"one", "two", "three", "heldout", "ceiling", "reconstruction", "floor"}
    for kind in groups:
        assert set(report[kind]) == {"all", *FIGURES}
        assert report[kind]["all"] == pytest.approx(0.75, abs=0.03)
        assert report["ceiling"][kind]["all"] >= 0.97
        assert report["ceiling"][kind]["letter"] >= 0.97
        assert report["reconstruction"][kind]["all"] >= 0.97
        assert report["floor"][kind]["all"] <= 0.05
        assert report["floor"][kind]["letter"] < 0.25


def test_it_says_which_pictures_it_wants(reader):
    """(group, split, number of words): the stage takes them from there."""
    assert reader.groups == (("one", "val", 1), ("two", "val", 2), ("three", "val", 3), ("heldout", "held_out", 1))


def test_a_count_that_does_not_fit_is_refused(reader):
    with pytest.raises(ValueError, match="2 pictures against the attributes of 1"):
        reader.score(np.zeros((2, 64, 64, 3), np.uint8), attributes_of(pictures_of("one", 1)))
    with pytest.raises(ConfigError, match="num_captions is 1"):
        Spelling(lettering.Vocabulary(), num_captions=1)


def test_the_config_builds_it():
    with initialize_config_dir(str(CONFIGS), version_base="1.3"):
        node = compose("metric/diffusion_words").metric
    built = instantiate(node)
    pictures = pictures_of("two", 4)
    assert set(built) == {"caption_match", "memorisation"}
    assert built.caption_match.num_captions == 256
    assert built.caption_match.score(render(pictures), attributes_of(pictures))["all"] == 1.0
