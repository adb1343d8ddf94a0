"""A run that asks for captions that nobody has says so before it trains on none."""

import json

import pytest

from sdtrain.data.caption import CaptionRule
from sdtrain.data.caption_check import NUM_LOOKED, check_captions
from sdtrain.data.datamodule import ShardDataModule
from sdtrain.data.lane import Lanes
from sdtrain.data.reader import Reader
from sdtrain.data.sequential import SequentialDataModule
from sdtrain.errors import ConfigError

TOLD = (b"a dog", {"short": "dog", "deep": {"text": ["in there"]}, "width": 3, "none": None})


def check(fields, *samples, **options):
    return check_captions(CaptionRule(fields, **options), samples, "data.caption")


@pytest.mark.parametrize("options", [{}, {"empty": "drop"}])
def test_a_field_that_no_sample_has_is_refused_with_those_there_are(options):
    with pytest.raises(ConfigError) as error:
        check({"json.typo": 1, "json.deep.typo": 1}, *[TOLD] * 3, **options)
    assert str(error.value) == (
        "data.caption.fields: none of 3 samples has a caption in json.typo, json.deep.typo; there is txt, json.short, "
        "json.deep.text. Name a field that is there, or set conditioner=none to train without captions"
    )
    with pytest.raises(ConfigError, match="there is json.short"):
        check(None, (None, {"short": "dog"}), (b" ", None), **options)


def test_a_field_that_is_missing_beside_others_is_told():
    note = check({"txt": 1, "json.typo": 1}, *[TOLD] * 5)
    assert note == "data.caption.fields: none of 5 samples has json.typo; the other fields take its share"
    assert check({"txt": 1, "json.short": 1}, (b"a dog", None), (None, {"short": "dog"})) == ""


def test_it_looks_no_further_than_it_must():
    def endless():
        while True:
            taken.append(1)
            yield TOLD

    taken = []
    assert check_captions(CaptionRule(), endless(), "x") == ""
    assert len(taken) == 1
    assert check_captions(CaptionRule({"txt": 1, "json.typo": 1}), endless(), "x")
    assert len(taken) == 1 + NUM_LOOKED


def test_pictures_without_any_text_are_what_was_meant():
    assert "without words" in check(None, (None, None), (b"", {"width": 3}))
    assert check(None) == ""
    for options in ({"fields": {"json.caption": 1}}, {"fields": None, "empty": "drop"}):
        with pytest.raises(ConfigError, match="there is no text at all"):
            check(options.pop("fields"), (None, None), **options)


def test_what_cannot_be_read_is_there():
    assert check(None, (b"\xff\xfe\xfd", None)) == ""


@pytest.mark.parametrize("kind", [ShardDataModule, SequentialDataModule])
def test_a_run_is_refused_where_its_conditioner_asks_for_captions(make_shards, make_sample, capsys, kind):
    samples = [make_sample(n, json=json.dumps({"short": f"{n}"}).encode()) for n in range(40)]
    folder = str(make_shards(samples, per_shard=10)[0].parent)

    read = Reader if kind is ShardDataModule else Lanes

    def new(fields):
        def reader(*args, **options):
            return read(*args, caption=CaptionRule(fields), **options)

        data = kind(folder, image_size=16, reader=reader)
        data.connect(3, 8)
        return data

    data = new({"json.typo": 1})
    data.accompany([])  # no conditioner reads captions
    with pytest.raises(
        ConfigError, match=r"^data.reader.caption.fields: none of \d+ .* json.typo; there is .*json.short"
    ):
        data.accompany(["caption"])
    capsys.readouterr()
    new({"txt": 1, "json.typo": 1}).accompany(["caption"])
    assert "has json.typo; the other fields take its share" in capsys.readouterr().out
    new({"json.short": 1}).accompany(["caption"])
    assert "share" not in capsys.readouterr().out


@pytest.mark.parametrize("kind", [ShardDataModule, SequentialDataModule])
def test_empty_captions_are_counted(make_shards, make_sample, kind):
    samples = [make_sample(n, txt=b"" if n % 2 else b"a") for n in range(40)]
    data = kind(str(make_shards(samples, per_shard=10)[0].parent), image_size=16)
    data.connect(3, 8)
    batches = iter(data.train_dataloader())
    told = [caption for _ in range(4) for caption in next(batches)["caption"]]
    counts = data.accounting()
    assert counts["empty_captions"] == told.count("") > 0
    assert counts["read"] == len(told)


@pytest.mark.parametrize("kind", [ShardDataModule, SequentialDataModule])
@pytest.mark.parametrize("number", [0, -1])
def test_numbers_that_take_no_sample(make_shards, kind, number):
    folder = str(make_shards(20, per_shard=5)[0].parent)
    with pytest.raises(ConfigError, match=f"^trainer.batch_size: {number} is not above 0$"):
        kind(folder).connect(3, number)
    with pytest.raises(ConfigError, match=f"^trainer.num_accumulate: {number} is not above 0$"):
        kind(folder).connect(3, 8, number)
    with pytest.raises(ConfigError, match="^data.num_workers: -1 is below 0"):
        kind(folder, num_workers=-1)
