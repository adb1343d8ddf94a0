"""The words that the recognition network learns to name, and that it does learn them."""

from pathlib import Path

import torch

from sdtrain.contracts import Context
from sdtrain.layer.vgg import VGG
from sdtrain.optim.adamw import AdamW
from sdtrain.stage.recognition import RecognitionStage, vocabulary
from sdtrain.tracker.none import NullTracker


def test_the_most_telling_words_stand_in_many_captions_but_not_in_most():
    captions = ["a red star", "a red ring", "A blue star!", "a blue, blue ring", "a green cross", "a red cross"]
    assert vocabulary(captions, 10) == ["red", "blue", "cross", "ring", "star"]  # `a` in all, `green` in one
    assert vocabulary(captions, 2) == ["red", "blue"]


def test_words_of_equal_counts_go_by_the_alphabet():
    """Sets of words come in another order in each process, and each rank would learn other words."""
    words = [f"word{n:02d}" for n in range(40)]
    captions = [" ".join(words), " ".join(reversed(words)), "x", "y"]
    assert vocabulary(captions, 40) == words


def test_few_captions_and_none():
    assert vocabulary(["red star", "red ring"], 5) == ["red"]
    assert vocabulary(["one", "two", "three"], 5) == []
    assert vocabulary([], 5) == []
    assert vocabulary(["ein Bär", "der Bär", "日本 日本", "x"], 5) == ["bär"]


def stage(words):
    torch.manual_seed(0)
    context = Context("recognition", Path("x"), Path("x"), NullTracker(), 0, 8, 10)
    return RecognitionStage(context, VGG(((4,), (8,))), words, AdamW(lr=0.02), None)


def test_targets_are_the_words_that_stand_in_the_caption():
    made = stage(["red", "star"])
    assert made.targets(["a RED, red ring", "a star", "redder stars", ""]).tolist() == [[1, 0], [0, 1], [0, 0], [0, 0]]


def test_without_words_it_still_has_a_head():
    assert stage([]).logits(torch.zeros(2, 3, 16, 16)).shape == (2, 1)


def test_it_learns_a_words_colour_and_its_place():
    made = stage(["red", "left"])
    image = torch.full((8, 3, 16, 16), -1.0)
    captions = []
    for n in range(8):
        is_red, is_left = n % 2 == 0, n % 4 < 2
        channel, column = (0 if is_red else 2), (2 if is_left else 10)
        image[n, channel, 4 + n // 4 : 9 + n // 4, column : column + 4] = 1.0
        captions.append(f"{'red' if is_red else 'blue'} {'left' if is_left else 'right'}")
    optimizer = made.configure_optimizers()["optimizer"]
    targets = made.targets(captions)
    assert targets.sum().item() == 8
    for _ in range(60):
        loss = torch.nn.functional.binary_cross_entropy_with_logits(made.logits(image), targets)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert torch.equal(made.logits(image) > 0, targets > 0)
