"""GenEval's rules on detections made by hand: objects, counts, colours, positions, and what is too much."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch

from sdtrain.errors import ConfigError
from sdtrain.metric.detector import Detection
from sdtrain.metric.geneval import COLOURS, GROUND, GenEval, certain, check_asked, judge, relations


def one(name, box=(0, 0, 10, 10), score=0.95, colour="red"):
    left, top, right, bottom = box
    mask = np.zeros((64, 64), bool)
    mask[top:bottom, left:right] = True
    found = Detection(name, score, box, mask)
    PAINTED[box] = colour
    return found


PAINTED = {}


def judged(detections, include, tag="colors", exclude=()):
    asked = {"tag": tag, "include": include, "exclude": exclude, "prompt": ""}
    seen = []

    def colours(found, name):
        seen.append((name, len(found)))
        return [PAINTED[detection.box] for detection in found]

    return judge(asked, certain(detections, tag), colours)


def test_an_object_must_be_there_and_certain_enough():
    want = [{"class": "bench", "count": 1}]
    assert judged([one("bench", score=0.31)], want, "single_object")
    assert not judged([one("bench", score=0.3)], want, "single_object")
    assert not judged([one("chair")], want, "single_object")
    assert not judged([], want, "single_object")


def test_both_objects_must_be_there():
    want = [{"class": "bench", "count": 1}, {"class": "cow", "count": 1}]
    assert judged([one("cow"), one("bench"), one("dog")], want, "two_object")
    assert not judged([one("bench"), one("bench")], want, "two_object")


def test_counts_are_exact_by_what_is_too_much_and_ask_for_more_certainty():
    want, no = [{"class": "dog", "count": 3}], [{"class": "dog", "count": 4}]
    assert judged([one("dog")] * 3, want, "counting", no)
    assert not judged([one("dog")] * 2, want, "counting", no)
    assert not judged([one("dog")] * 4, want, "counting", no)
    assert judged([one("dog")] * 3 + [one("dog", score=0.89)], want, "counting", no)
    assert not judged([one("dog")] * 2 + [one("dog", score=0.89)], want, "counting", no)
    assert len(certain([one("dog")] * 20, "counting")["dog"]) == 16


def test_colours_are_of_the_most_certain_ones():
    want = [{"class": "car", "count": 1, "color": "pink"}]
    pink, red = one("car", (0, 0, 5, 5), 0.9, "pink"), one("car", (9, 9, 20, 20), 0.8, "red")
    assert judged([red, pink], want)
    assert not judged([red._replace(score=0.95), pink], want)
    assert not judged([pink, red], [{"class": "car", "count": 2, "color": "pink"}])
    both = [{"class": "car", "count": 1, "color": "pink"}, {"class": "bus", "count": 1, "color": "blue"}]
    blue = one("bus", (30, 30, 40, 40), 0.9, "blue")
    assert judged([pink, blue], both, "color_attr")
    assert not judged([pink, one("bus", (41, 41, 50, 50), 0.9, "red")], both, "color_attr")


def test_a_position_is_of_both_and_of_nothing_that_is_not_there():
    want = [{"class": "dog", "count": 1}, {"class": "tie", "count": 1, "position": ["right of", 0]}]
    dog, tie = one("dog", (0, 20, 20, 40)), one("tie", (40, 20, 60, 40))
    assert judged([dog, tie], want, "position")
    assert not judged([dog._replace(box=(40, 20, 60, 40)), tie._replace(box=(0, 20, 20, 40))], want, "position")
    assert not judged([tie], want, "position")
    assert not judged([dog._replace(score=0.1), tie], want, "position")


@pytest.mark.parametrize(
    ("box", "expected"),
    [
        ((40, 0, 60, 20), {"right of"}),
        ((-40, 0, -20, 20), {"left of"}),
        ((0, 40, 20, 60), {"below"}),
        ((0, -40, 20, -20), {"above"}),
        ((40, 40, 60, 60), {"right of", "below"}),
        ((4, 0, 24, 20), set()),  # its centre is within a tenth of both sizes
        ((5, 0, 25, 20), set()),  # a fifth of the way beyond, of 0.5 that are wanted
        ((9, 0, 29, 20), {"right of"}),
        ((0, 0, 20, 20), set()),
        ((40, 12, 60, 32), {"right of"}),  # a little lower
    ],
)
def test_relations_are_by_centres_beyond_a_tenth_of_the_sizes(box, expected):
    assert relations(box, (0, 0, 20, 20)) == expected


class Clip:
    """Features are mean colours; the name of a colour is near its own, and says what it was asked."""

    mean = torch.zeros(1)
    paints = {"red": (1.0, 0, 0), "green": (0, 1.0, 0), "blue": (0, 0, 1.0)}

    def __init__(self):
        self.asked, self.shown = [], []

    def texts(self, captions):
        self.asked += captions
        found = [next((v for k, v in self.paints.items() if k in text), (-1.0, -1, -1)) for text in captions]
        return torch.nn.functional.normalize(torch.tensor(found), dim=1)

    def __call__(self, pictures):
        self.shown.append(pictures)
        return torch.nn.functional.normalize(pictures.float().mean((2, 3)) - 120, dim=1)


def test_a_picture_is_judged_by_the_objects_pixels_alone():
    picture = np.full((64, 64, 3), (255, 0, 0), np.uint8)
    picture[10:20, 30:50] = (0, 0, 255)
    bus = one("bus", (30, 10, 50, 20))
    bus.mask[10:20, 45:] = bus.mask[10:20, :35] = False  # the rest is grey
    clip = Clip()
    planes = []
    detector = lambda shown: planes.append(shown) or [bus]  # noqa: E731
    detector.mean = torch.zeros(1)
    judge_picture = GenEval(detector, clip)
    asked = {"tag": "colors", "include": [{"class": "bus", "count": 1, "color": "blue"}]}
    assert judge_picture(picture, asked)
    assert planes[0].shape == (3, 64, 64)
    (shown,) = clip.shown
    assert shown.shape == (1, 3, 10, 10)  # the square in the middle of 10 x 20
    assert shown[0, :, 5, :].unique().tolist() == [0, 255]
    asked["include"][0]["color"] = "red"
    assert not judge_picture(picture, asked)
    assert len(clip.asked) == 3 * len(COLOURS)  # once for a name
    assert clip.asked[:3] == ["a photo of a red bus", "a photo of a red-colored bus", "a photo of a red object"]
    tall = bus._replace(box=(48, 10, 50, 20), mask=np.zeros((64, 64), bool))
    judge_picture.colour(picture, tall, "bus")
    assert clip.shown[-1].shape == (1, 3, 2, 2)
    assert clip.shown[-1].unique().tolist() == [GROUND]


def test_lines_that_cannot_be_judged_are_named():
    good = {"tag": "position", "prompt": "", "include": [{"class": "dog", "count": 1}]}
    check_asked([good])
    for include, expected in [
        ([{"class": "unicorn", "count": 1}], "prompt 2: the detector knows no 'unicorn'"),
        ([{"class": "dog", "count": 0}], "count: 0 is no number"),
        ([{"class": "dog", "count": 1, "color": "teal"}], "color: 'teal' is none of red"),
        ([{"class": "dog", "count": 1, "position": ["above", 0]}], "no relation to an object before it"),
        ([], "it asks for nothing"),
        ([{"count": 1}], r"cannot be judged \(KeyError\('class'\)\); it wants a JSON object a line"),
    ]:
        with pytest.raises(ConfigError, match=expected):
            check_asked([good, {**good, "include": include}])


def test_shares_are_by_tag_and_the_overall_one_is_their_mean():
    from sdtrain.interop.look import Objects
    from sdtrain.interop.ranks import Ranks

    prompts = [{"tag": "colors"}, {"tag": "counting"}, {"tag": "colors"}]
    look = Objects(lambda picture, asked: bool(picture[0, 0, 0]), prompts, Ranks())
    pictures = np.array([1, 0, 0, 1, 1], np.uint8).repeat(12).reshape(5, 2, 2, 3)
    look.add(pictures[:1], [0], [])
    assert look.figures() == {"geneval/colors": 1.0}  # one tag has no picture, so there is no mean
    look.add(pictures[1:], [1, 2, 3, 4], [])
    assert look.figures() == pytest.approx(
        {"geneval/colors": 2 / 3, "geneval/counting": 0.5, "geneval/overall": (2 / 3 + 0.5) / 2}
    )
    other = Objects(lambda *_: True, prompts, SimpleNamespace(sum=lambda own: [2 * n for n in own]))
    other.add(pictures, range(5), [])
    assert other.figures()["geneval/overall"] == 1.0
