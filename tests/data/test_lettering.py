"""The rendered words: what is drawn, what is held out, what captions say, and that it is the same everywhere."""

import hashlib
import re

import numpy as np
import pytest

from sdtrain.data import lettering
from sdtrain.data.lettering import COMMON, HELD_OUT, LETTERS, SIZE, Lettering, Word, letterings, render


@pytest.fixture(scope="module")
def mixed():
    return list(letterings("mixed", 0, 600))


def test_the_same_seed_gives_the_same_pictures(mixed):
    again = list(letterings("mixed", 0, 60))
    assert again == mixed[:60]
    assert (render([shown for shown, _ in again]) == render([shown for shown, _ in mixed[:60]])).all()
    others = [*letterings("mixed", 1, 60), *letterings("held_out", 0, 60)]
    assert not {shown for shown, _ in others} & {shown for shown, _ in mixed}


def test_the_pictures_are_those_of_the_first_version():
    """Shards carry a version in their folder's name: other pixels or captions need another number there."""
    shown, told = zip(*letterings("mixed", 0, 12), *letterings("held_out", 0, 4))
    pixels = hashlib.sha256(render(shown).tobytes() + "\n".join(told).encode())
    assert pixels.hexdigest()[:16] == "f8ee8db92345a25e"


def test_one_two_and_three_words_of_two_to_five_letters_stand_within_the_picture(mixed):
    pictures = [shown for shown, _ in mixed]
    assert [len(shown.things) for shown in pictures[:6]] == [1, 2, 3, 1, 2, 3]
    words = [word for shown in pictures for word in shown.things]
    assert {len(word.text) for word in words} == {2, 3, 4, 5}
    assert set("".join(word.text for word in words)) == set(LETTERS)
    images = render(pictures)
    for image, shown in zip(images, pictures):
        ground = np.array(lettering.GROUNDS[shown.ground])
        assert (image[:1] == ground).all()
        assert (image[-1:] == ground).all()
        assert (image[:, [0, -1]] == ground).all()
        inked = (image != ground).any((1, 2))
        assert np.diff(inked.astype(int)).clip(0).sum() == len(shown.things)  # a word a line, apart from each other
    assert len({word.x for word in words}) > 50
    assert len({word.y for word in words}) > 50
    assert len({shown.height for shown in pictures}) == 7


def test_held_out_words_are_never_shown_in_training(mixed, monkeypatch):
    assert len(HELD_OUT) == 31
    assert set(HELD_OUT) < set(COMMON)
    assert len(set(COMMON)) == len(COMMON)
    held_out = {shown.things[0].text for shown, _ in letterings("held_out", 0, 600)}
    assert held_out == set(HELD_OUT)
    monkeypatch.setattr(lettering, "LETTERS", "SO")  # among random strings of these, every sixth would be "SO"
    monkeypatch.setattr(lettering, "MAX_LETTERS", 2)
    drawn = {word.text for shown, _ in letterings("mixed", 0, 200) for word in shown.things}
    assert {"OS", "OO", "SS"} <= drawn
    assert not drawn & set(HELD_OUT)
    assert not {word.text for shown, _ in mixed for word in shown.things} & set(HELD_OUT)


def test_half_of_the_words_are_common_ones(mixed):
    words = [word.text for shown, _ in mixed for word in shown.things]
    assert np.mean([word in COMMON for word in words]) == pytest.approx(0.5, abs=0.04)


def test_letters_fill_their_boxes_and_differ():
    height, rows, columns = 12.0, 14, 10
    drawn = np.stack([lettering.glyph(letter, height, 0.8, 1.0, rows, columns) for letter in LETTERS])
    assert drawn.shape == (26, rows, columns)
    assert drawn.dtype == np.float32
    assert (drawn.max((1, 2)) == 1).all()
    assert (drawn[:, 0] < 0.01).all()
    assert (drawn[:, 1:3].max((1, 2)) > 0.9).all()  # the top of the box
    assert (drawn[:, 11:13].max((1, 2)) > 0.9).all()  # the bottom
    assert (drawn[:, :, 1:3].max((1, 2)) > 0.9).all()  # the left
    assert (drawn[:, :, 7:9].max((1, 2)) > 0.9).all()  # the right
    assert len(np.unique(np.round(drawn, 2))) > 30  # anti-aliased
    flat = drawn.reshape(26, -1) / np.linalg.norm(drawn.reshape(26, -1), axis=1, keepdims=True)
    likeness = (flat @ flat.T - np.eye(26)).max()
    assert likeness < 0.95


def test_ink_is_the_colour_on_the_ground():
    shown = Lettering((Word("TIE", 5.0, 7.0),), "blue", "beige", 12.0)
    (image,) = render([shown])
    assert image.dtype == np.uint8
    assert image.shape == (SIZE, SIZE, 3)
    assert tuple(image[8, 9]) == lettering.COLOURS["blue"]  # in the bar of the T
    assert tuple(image[16, 6]) == lettering.GROUNDS["beige"]  # under it


def test_colours_are_told_from_their_grounds(mixed):
    for shown, _ in mixed:
        ink, paper = lettering.COLOURS[shown.colour], lettering.GROUNDS[shown.ground]
        assert abs(np.dot(np.subtract(ink, paper), lettering.LUMA)) >= 35
    assert {shown.colour for shown, _ in mixed} == set(lettering.COLOURS)
    assert {shown.ground for shown, _ in mixed} == set(lettering.GROUNDS)


def test_captions_quote_the_words_letter_by_letter_and_name_the_colours(mixed):
    for shown, told in mixed:
        assert [quoted.replace(" ", "") for quoted in re.findall('"(.*?)"', told)] == [w.text for w in shown.things]
        rest = re.sub('".*?"', "", told)
        assert set(rest.replace(",", "").split()) >= {shown.colour, shown.ground}
        assert not [word for word in re.findall(r"\w+", rest) if len(word) == 1]  # an "a" would pass for the letter


@pytest.mark.parametrize(("num_words", "listed"), [(1, '"O N"'), (2, '"O N" and "G O"'), (3, '"O N", "G O" and "U P"')])
def test_words_are_listed(num_words, listed):
    words = tuple(Word(text, 2.0, 2.0) for text in ("ON", "GO", "UP")[:num_words])
    told = {lettering.caption(Lettering(words, "red", "white", 12.0), np.random.default_rng(i)) for i in range(40)}
    noun = "word" if num_words == 1 else "words"
    assert told == {
        f"the {noun} {listed} in red on white",
        f"{listed} written in red on white",
        f"red letters on white that say {listed}",
        f"on white, the {noun} {listed} in red",
    }


def test_the_learned_tokenizer_has_a_token_a_letter(mixed):
    """What captions are spelt out for: held-out words are told in tokens that training has seen."""
    from sdtrain.conditioner.tokenizer import train_tokenizer

    tokenizer = train_tokenizer([told for _, told in mixed], 1024)
    for _, told in letterings("held_out", 0, 100):
        (quoted,) = re.findall('"(.*?)"', told)
        ids = tokenizer(told).input_ids
        letters = [tokenizer.decode([i]).strip() for i in ids]
        assert "".join(letter for letter in letters if len(letter) == 1 and letter.isalpha()).upper() == (
            quoted.replace(" ", "")
        )
    seen = {i for _, told in mixed for i in tokenizer(told).input_ids}
    assert {i for _, told in letterings("held_out", 0, 100) for i in tokenizer(told).input_ids} <= seen
    longest = [Lettering(tuple(Word(text, 0.0, 0.0) for text in ("WORLD", "EARTH", "QUEEN")), "red", "teal", 12.0)]
    told = [lettering.caption(shown, np.random.default_rng(i)) for shown in longest for i in range(20)]
    assert max(len(tokenizer(text).input_ids) for text in told) <= 40  # conditioner.max_tokens of experiment=words


def test_attributes_are_plain(mixed):
    import json

    shown, _ = mixed[1]
    found = json.loads(json.dumps(shown.attributes()))
    assert [word["text"] for word in found["things"]] == [word.text for word in shown.things]
    assert (found["colour"], found["ground"], found["height"]) == (shown.colour, shown.ground, shown.height)
