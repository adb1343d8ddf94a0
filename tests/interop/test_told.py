"""What is told, as a batch: the first mistake is the one that is said."""

import pytest

from sdtrain.contracts import Input
from sdtrain.errors import ConfigError
from sdtrain.interop.told import read_told

SIZES = {"image_size": (64, 64), "latent_size": (16, 16)}


def test_what_is_not_read_is_told_before_what_is_missing():
    with pytest.raises(ConfigError, match="^caption is given, and this run's model does not read it; it reads label$"):
        read_told({"caption": "a star"}, {"label": Input("label")}, None, SIZES)
    with pytest.raises(ConfigError, match="^label is missing: this run's model reads label$"):
        read_told({}, {"label": Input("label")}, None, SIZES)


def test_one_value_is_for_all_pictures_and_a_list_has_one_for_each():
    inputs = {"caption": Input("text"), "noise_level": Input("label", is_needed=False)}
    batch = read_told({"caption": ["a", "b"], "noise_level": 20}, inputs, None, SIZES)
    assert batch == {"caption": ["a", "b"], "noise_level": [20, 20]}
    with pytest.raises(ConfigError, match="caption: 2 for 3 pictures"):
        read_told({"caption": ["a", "b"], "noise_level": [1, 2, 3]}, inputs, None, SIZES)
