"""SDXL's sizes: from the .json where it says them, else the picture's own."""

import pytest
import torch

from sdtrain.conditioner.size import Size
from sdtrain.errors import ConfigError
from sdtrain.ops.random import Draw


def test_from_the_json_or_the_picture():
    attributes = [{"height": 600, "width": 800, "crop": [0, 44]}, {"height": 600}, {}, None]
    batch = {"caption": [""] * 4, "image_size": (512, 768), "attributes": attributes}
    told = Size()(batch, Draw.of(0, 4))
    rows = [[600, 800, 0, 44], [600, 768, 0, 0], [512, 768, 0, 0], [512, 768, 0, 0]]
    assert told["sizes"].tolist() == [[*row, 512, 768] for row in rows]
    assert told["sizes"].dtype == torch.float32
    assert torch.equal(Size().unconditional(batch)["sizes"], told["sizes"])
    assert Size()({"caption": ["a"], "image_size": (8, 16)})["sizes"].tolist() == [[8, 16, 0, 0, 8, 16]]


def test_from_the_reader_where_the_json_says_nothing():
    read = {"original_size": torch.tensor([[600, 900], [700, 500]]), "crop_top_left": torch.tensor([[0, 7], [3, 0]])}
    batch = {"caption": [""] * 2, "image_size": (64, 64), "attributes": [None, {"width": 1000}], **read}
    assert Size()(batch)["sizes"].tolist() == [[600, 900, 0, 7, 64, 64], [700, 1000, 3, 0, 64, 64]]
    batch["target_size"] = torch.tensor([[64, 64], [32, 96]])
    assert Size()(batch)["sizes"].tolist() == [[600, 900, 0, 7, 64, 64], [700, 1000, 3, 0, 32, 96]]


@pytest.mark.parametrize("said", [{"crop": 4}, {"crop": [1, 2, 3]}, {"height": "tall"}, {"width": None}])
def test_what_is_no_size_names_its_sample(said):
    with pytest.raises(ConfigError, match="sample s/7: height .*must be pixels"):
        Size()({"caption": [""], "key": ["s/7"], "image_size": (8, 8), "attributes": [said]})
