"""T5's encoder: what transformers says, padding masked or not, and nothing where it is left out."""

import pytest
import torch
from transformers import AutoTokenizer, T5EncoderModel

from sdtrain.conditioner.t5 import T5
from sdtrain.errors import ConfigError
from sdtrain.ops.random import Draw

SMALL = {"width": 48, "max_tokens": 32}


@pytest.fixture
def folder(sd3_folder):
    return f"{sd3_folder}/text_encoder_3"


@pytest.mark.parametrize("masked", [False, True])
def test_the_states_are_transformers_own(folder, captions, masked):
    tokenizer = AutoTokenizer.from_pretrained(folder.replace("text_encoder", "tokenizer"))
    tokens = tokenizer(captions, padding="max_length", truncation=True, max_length=32, return_tensors="pt")
    mask = tokens.attention_mask if masked else None
    expected = T5EncoderModel.from_pretrained(folder)(tokens.input_ids, attention_mask=mask).last_hidden_state
    told = T5(folder, masked=masked, **SMALL)({"caption": captions})
    torch.testing.assert_close(told["context"], expected, rtol=0, atol=1e-5)
    assert ("context_mask" in told) is masked
    if masked:
        assert torch.equal(told["context_mask"], tokens.attention_mask.bool())


def test_masked_padding_changes_nothing_that_is_read(folder):
    """With room for more tokens the words say the same; unmasked they do not, as T5 looks both ways."""
    for masked in (True, False):
        short, long = (
            T5(folder, masked=masked, width=48, max_tokens=n)({"caption": ["a red star"]})["context"] for n in (16, 32)
        )
        assert torch.allclose(short[:, :11], long[:, :11], atol=1e-5) is masked


def test_frozen_or_trained(folder, captions):
    frozen = T5(folder, **SMALL)
    assert list(frozen.parameters()) == []
    assert frozen.state_dict() == {}
    assert not frozen({"caption": captions})["context"].requires_grad
    trained = T5(folder, trained=True, **SMALL)
    trained({"caption": captions})["context"].sum().backward()
    assert [name for name, p in trained.named_parameters() if p.grad is None] == []


def test_null_and_dropout(folder):
    t5 = T5(folder, dropout=0.5, **SMALL)
    captions = ["a red star"] * 64
    told = t5({"caption": captions}, Draw.of(0, 64))["context"]
    null = t5.unconditional({"caption": captions})["context"]
    is_null = (told - null).abs().amax((1, 2)) < 1e-6
    assert 0.25 < is_null.float().mean() < 0.75
    zeros = T5(folder, dropout=0.5, empty_caption="zeros", **SMALL)({"caption": captions}, Draw.of(0, 64))["context"]
    assert torch.equal(zeros.flatten(1).any(1), ~is_null)


@pytest.mark.parametrize("masked", [False, True])
def test_left_out_it_says_zeros(masked):
    t5 = T5(None, masked=masked, **SMALL)
    told = t5({"caption": ["a", "b"]}, Draw.of(0, 2))
    assert told["context"].shape == (2, 32, 48)
    assert not told["context"].any()
    assert t5.unconditional({"caption": ["a"]})["context"].shape == (1, 32, 48)
    assert t5.state_dict() == {}
    assert not told.get("context_mask", torch.zeros(1)).any()


def test_what_cannot_work_is_refused(folder):
    with pytest.raises(ConfigError, match="width is 4096, but .* has 48"):
        T5(folder)
    with pytest.raises(ConfigError, match="pretrained=/nonexistent: .* it wants a T5 encoder"):
        T5("/nonexistent")
