"""Class labels: a number or a name, from the .json or the caption; the null class; samples without one."""

import pytest
import torch

from sdtrain.conditioner.label import Label
from sdtrain.errors import ConfigError
from sdtrain.ops.random import Draw


def batch(*labels, **more):
    return {"caption": ["text"] * len(labels), "attributes": [{"label": label} for label in labels], **more}


def test_numbers_and_names():
    assert Label(11)(batch(0, 9, "3"))["class_labels"].tolist() == [0, 9, 3]
    named = Label(4, names=["cat", "dog", "bird"])
    assert named(batch("bird", "cat"))["class_labels"].tolist() == [2, 0]
    assert named(batch("bird"))["class_labels"].dtype == torch.int64
    assert Label(4, key="kind")({"caption": [""], "attributes": [{"kind": 2}]})["class_labels"].tolist() == [2]


def test_the_caption_may_be_the_class():
    assert Label(3, key=None, names=["cat", "dog"])({"caption": ["dog", "cat"]})["class_labels"].tolist() == [1, 0]


def test_a_batch_may_say_the_label_itself():
    assert Label(4, names=["cat", "dog", "bird"])(batch("cat", label=["bird"]))["class_labels"].tolist() == [2]
    with pytest.raises(ConfigError, match="sample number 0: its label is 'cow', not a name"):
        Label(3, key=None, names=["cat", "dog"])({"caption": ["cat"], "label": ["cow"]})


def test_of_data_with_names_a_number_is_no_class_unless_the_batch_says_it_itself():
    label = Label(3, key=None, names=["cat", "dog"])
    with pytest.raises(ConfigError, match="sample number 0: its caption is '1', not a name of conditioner.names"):
        label({"caption": ["1"]})
    assert label({"caption": ["1"], "label": ["1"]})["class_labels"].tolist() == [1]


def test_null_is_one_class_more():
    label = Label(11)
    assert label.unconditional(batch(0, 1))["class_labels"].tolist() == [10, 10]
    assert label.state_dict() == {}


def test_dropout_goes_to_the_null_class_by_sample():
    label, num = Label(11, dropout=0.3), 4000
    told = label(batch(*[4] * num), Draw.of(0, num))["class_labels"]
    assert set(told.tolist()) == {4, 10}
    assert float((told == 10).float().mean()) == pytest.approx(0.3, abs=0.03)
    half = label(batch(*[4] * 10), Draw(0, torch.arange(20, 30), torch.zeros(10, dtype=torch.int64)))
    assert torch.equal(half["class_labels"], told[20:30])
    assert (label(batch(*[4] * num))["class_labels"] == 4).all()


@pytest.mark.parametrize(
    ("label", "told"),
    [
        (None, "'label' in its .json is None, not a whole number from 0 to 9"),
        (10, "'label' in its .json is 10, not a whole number from 0 to 9"),
        (-1, "is -1"),
        (True, "is True"),
        (1.5, "is 1.5"),
        ("dog", "is 'dog'"),
        ([1], r"is \[1\]"),
    ],
)
def test_a_sample_without_a_label_is_named(label, told):
    with pytest.raises(ConfigError, match=f"sample shard-0/000017: .*{told}"):
        Label(11)(batch(3, label, key=["shard-0/000016", "shard-0/000017"]))


def test_a_sample_without_a_json_is_named():
    for attributes in ({"attributes": [None]}, {}):
        with pytest.raises(ConfigError, match="sample number 0: 'label' in its .json is None"):
            Label(11)({"caption": ["a"], **attributes})
    with pytest.raises(ConfigError, match="sample number 1: its caption is 'cow', not a name of conditioner.names"):
        Label(3, key=None, names=["cat", "dog"])({"caption": ["cat", "cow"]})


def test_a_table_of_another_length_is_refused():
    with pytest.raises(ConfigError, match="num_class_embeds=2 must be 3: 2 names and the null class"):
        Label(2, names=["cat", "dog"])
