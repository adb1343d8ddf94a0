"""What an evaluation draws with: of a split, all that the model reads of a sample."""

from types import SimpleNamespace

import numpy as np
import pytest

from sdtrain.interop.evaluation import Evaluation
from sdtrain.interop.ranks import Ranks
from sdtrain.metric.distribution import SEED_STRIDE

PROTOCOL = {"seed": 5, "split": "val", "num_steps": 2, "sampler": None}


class Data:
    splits = {"val": 3}

    def load(self, split, places, as_images):
        assert (split, as_images) == ("val", True)
        return {"caption": [f"number {i}" for i in places], "original_size": np.array(places)}


def drawn(inputs, draws_split):
    """The batch that is drawn, of the places 2 to 4 in the batch number 7, and its seed."""
    pipe = SimpleNamespace(inputs=dict.fromkeys(inputs), draw=lambda *given: given)
    evaluation = Evaluation(None, Data(), PROTOCOL, None, Ranks(), {}, None, None, draws_split=draws_split)
    batch, seed, *rest = evaluation._draw(pipe, ["a", "b", "c"], [2, 3, 4], 1.5, 7)
    assert (seed, rest) == (5 + 7 * SEED_STRIDE, [1.5, 2, None])
    return batch


def test_sizes_are_those_of_the_split_which_comes_round():
    batch = drawn(["caption", "original_size"], draws_split=True)
    assert batch["caption"] == ["number 2", "number 0", "number 1"]
    assert batch["original_size"].tolist() == [2, 0, 1]


@pytest.mark.parametrize(("inputs", "draws_split"), [(["caption"], True), (["caption", "original_size"], False)])
def test_captions_alone_open_no_picture(inputs, draws_split):
    assert drawn(inputs, draws_split) == {"caption": ["a", "b", "c"]}
