"""Text from nothing: a small CLIP that learns, its dropout by sample, its null condition."""

import pytest
import torch

from sdtrain.conditioner.text import Text
from sdtrain.errors import ConfigError
from sdtrain.ops.random import Draw

CAPTIONS = [f"a {size} {colour} star" for size in ("big", "small") for colour in ("red", "blue")]
SMALL = {"width": 16, "num_layers": 2, "num_heads": 2, "vocab_size": 300, "max_tokens": 12}


def make(directory, **values):
    torch.manual_seed(0)
    conditioner = Text(**SMALL | values)
    conditioner.prepare(directory, lambda: CAPTIONS)
    return conditioner


@pytest.fixture
def text(tmp_path):
    return make(tmp_path, pooled_width=16)


def test_prepare_twice_gives_the_same_ids(text, tmp_path):
    again = Text(**SMALL)
    again.prepare(tmp_path, lambda: pytest.fail("it learned the captions again"))
    assert torch.equal(again.tokenize(CAPTIONS)[0], text.tokenize(CAPTIONS)[0])


def test_before_prepare_it_says_what_is_missing():
    with pytest.raises(RuntimeError, match="prepare"):
        Text(**SMALL).tokenize(["a"])


def test_a_samples_condition_does_not_depend_on_its_batch(text):
    whole = text({"caption": ["a big red star", "x" * 500, ""]})
    assert whole["context"].shape == (3, 12, 16)
    assert whole["pooled"].shape == (3, 16)
    alone = text({"caption": ["a big red star"]})
    for name, value in whole.items():
        torch.testing.assert_close(alone[name][0], value[0])


def test_pooled_is_the_state_of_the_end_token(text):
    told = text({"caption": ["a big red star", ""]})
    torch.testing.assert_close(told["pooled"], torch.stack((told["context"][0, 5], told["context"][1, 1])))


@pytest.mark.parametrize("pooled_width", [16, 20])
def test_pooled_is_what_transformers_pools_once_saved(tmp_path, pooled_width):
    text = make(tmp_path, pooled_width=pooled_width)
    text.encoder.save_pretrained(tmp_path / "saved")
    saved = type(text.encoder).from_pretrained(tmp_path / "saved")(text.tokenize(CAPTIONS)[0])
    expected = saved.pooler_output if pooled_width == 16 else saved.text_embeds
    torch.testing.assert_close(text({"caption": CAPTIONS})["pooled"], expected)


def test_null_is_the_empty_caption(text):
    null = text.unconditional({"caption": ["a big red star", "a small red star"]})
    empty = text({"caption": ["", ""]})
    assert null.keys() == empty.keys() == {"context", "pooled"}
    for name in null:
        torch.testing.assert_close(null[name], empty[name])
    assert not torch.allclose(null["context"], text({"caption": CAPTIONS[:2]})["context"])


def test_dropout_drops_the_share_asked(text, monkeypatch):
    text.dropout = 0.3
    read, num = [], 8000

    def encode(ids, mask):
        read.append((ids, mask))
        return {"context": ids.float()}

    monkeypatch.setattr(text, "encode", encode)
    text({"caption": ["a big red star"] * num}, Draw.of(0, num))
    (ids, mask), (empty, empty_mask) = *read, text.tokenize([""])
    gone = (ids == empty).all(dim=1)
    assert gone.float().mean() == pytest.approx(0.3, abs=5 * (0.21 / num) ** 0.5)
    assert (ids[~gone] == text.tokenize(["a big red star"])[0]).all()
    assert (mask[gone] == empty_mask).all()


def test_dropout_goes_by_sample_and_only_with_a_draw(text):
    text.dropout = 0.5
    ids = torch.arange(64)
    captions = ["a big red star"] * 64
    whole = text({"caption": captions}, Draw(0, ids, ids * 0))["context"]
    turned = text({"caption": captions}, Draw(0, ids.flip(0), ids * 0))["context"]
    torch.testing.assert_close(turned.flip(0), whole)
    halves = [text({"caption": captions[:32]}, Draw(0, half, half * 0))["context"] for half in ids.split(32)]
    torch.testing.assert_close(torch.cat(halves), whole)
    later = text({"caption": captions}, Draw(0, ids, ids * 0 + 1))["context"]
    assert not torch.allclose(later, whole)
    plain = text({"caption": captions})["context"]
    torch.testing.assert_close(plain, plain[:1].expand_as(plain))


@pytest.mark.parametrize("share", [0.0, 1.0])
def test_dropout_of_none_and_of_all(text, share):
    text.dropout = share
    context = text({"caption": ["a big red star"] * 64}, Draw.of(0, 64))["context"]
    caption = "" if share else "a big red star"
    torch.testing.assert_close(context, text({"caption": [caption]})["context"].expand_as(context))


@pytest.mark.parametrize("pooled_width", [None, 16, 20])
@pytest.mark.parametrize("layer", ["last", "penultimate", "penultimate_norm"])
def test_what_learns_has_a_gradient_and_what_is_not_read_does_not_learn(tmp_path, layer, pooled_width):
    text = make(tmp_path, layer=layer, pooled_width=pooled_width)
    told = text({"caption": CAPTIONS})
    assert ("pooled" in told) is (pooled_width is not None)
    assert pooled_width is None or told["pooled"].shape == (4, pooled_width)
    sum(value.square().sum() for value in told.values()).backward()
    assert [name for name, p in text.named_parameters() if p.requires_grad and p.grad is None] == []
    assert sum(p.requires_grad for p in text.parameters()) > 8
    frozen = {name.split(".layers.")[-1].split(".")[0] for name, p in text.named_parameters() if not p.requires_grad}
    assert frozen == (
        set() if layer == "last" or pooled_width else {"1"} | ({"encoder"} if layer == "penultimate" else set())
    )


def test_masked_padding(tmp_path):
    told = make(tmp_path, masked=True)({"caption": ["a big red star", ""]})
    assert told["context_mask"].sum(1).tolist() == [6, 2]
    assert told["context_mask"].dtype == torch.bool


def test_a_vocabulary_too_small_is_refused():
    with pytest.raises(ConfigError, match="vocab_size=100: .* at least 259"):
        Text(vocab_size=100)


def test_the_model_knows_the_numbers_of_its_marks(text):
    config, tokenizer = text.encoder.config, text.tokens.tokenizer
    for name in ("pad_token_id", "bos_token_id", "eos_token_id"):
        assert getattr(config, name) == getattr(tokenizer, name)
