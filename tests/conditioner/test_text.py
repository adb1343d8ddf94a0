"""Text as a condition: a tokenizer for any text, dropout by sample, and pretrained encoders from a folder."""

import shutil
import unicodedata
from pathlib import Path

import pytest
import torch
from transformers import CLIPTextConfig, CLIPTextModel

from sdtrain.conditioner.text import Text, train_tokenizer
from sdtrain.errors import ConfigError
from sdtrain.ops.random import Draw

CAPTIONS = [f"a {size} {colour} star" for size in ("big", "small") for colour in ("red", "blue")]
STRANGE = ["", "  two  spaces ", "日本語", "🟥🔷", "naïve café — “quotes”", "\x00\x07\n\t", "x" * 5000, "A RED STAR"]


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer(CAPTIONS, 300)


@pytest.fixture
def text(tmp_path):
    torch.manual_seed(0)
    conditioner = Text(width=16, num_layers=1, num_heads=2, vocab_size=300, max_tokens=12)
    conditioner.prepare(tmp_path, lambda: CAPTIONS)
    return conditioner


@pytest.fixture(scope="module")
def clip_folder(tmp_path_factory, tokenizer):
    """A CLIP text model and its tokenizer, as transformers saves them."""
    folder = tmp_path_factory.mktemp("clip")
    torch.manual_seed(1)
    config = CLIPTextConfig(
        vocab_size=300,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        max_position_embeddings=20,
    )
    CLIPTextModel(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


@pytest.mark.parametrize("caption", STRANGE)
def test_the_tokenizer_writes_any_text(tokenizer, caption):
    ids = tokenizer(caption).input_ids
    assert (ids[0], ids[-1]) == (1, 2)
    assert max(ids) < 300
    said = tokenizer.decode(ids[1:-1])
    assert said.strip() == unicodedata.normalize("NFC", caption).lower().strip()


def test_frequent_words_are_one_token_and_capitals_do_not_matter(tokenizer):
    assert len(tokenizer("a big red star").input_ids) == 4 + 2
    assert tokenizer("A Big RED star").input_ids == tokenizer("a big red star").input_ids


def test_the_same_captions_give_the_same_tokenizer(tokenizer):
    assert train_tokenizer(CAPTIONS, 300).get_vocab() == tokenizer.get_vocab()


def test_prepare_twice_gives_the_same_ids(text, tmp_path):
    again = Text(width=16, num_layers=1, num_heads=2, vocab_size=300, max_tokens=12)
    again.prepare(tmp_path, lambda: pytest.fail("it learned the captions again"))
    assert torch.equal(again.tokenize(CAPTIONS + STRANGE), text.tokenize(CAPTIONS + STRANGE))


def test_captions_are_cut_and_padded_to_one_length(text):
    ids = text.tokenize(["a big red star", "x" * 500, ""])
    assert ids.shape == (3, 12)
    assert ids[0].tolist()[6:] == [0] * 6
    assert ids[1, 0] == 1
    assert ids[1, -1] == 2  # a long caption still ends
    assert ids[2].tolist() == [1, 2] + [0] * 10


def test_a_full_memory_of_captions_loses_none(text):
    known = text.tokenize(["a big red star"])
    text._ids |= {str(n): [0] * 12 for n in range(200_000)}
    ids = text.tokenize(["a big red star", "a small blue star"])
    assert len(text._ids) < 200_000
    assert torch.equal(ids[:1], known)


def test_before_prepare_it_says_what_is_missing():
    with pytest.raises(RuntimeError, match="prepare"):
        Text(width=16, num_layers=1, num_heads=2, vocab_size=300).tokenize(["a"])


def test_a_samples_condition_does_not_depend_on_its_batch(text):
    whole = text({"caption": ["a big red star", "x" * 500, ""]})["context"]
    assert whole.shape == (3, 12, 16)
    alone = text({"caption": ["a big red star"]})
    for name, value in text({"caption": ["a big red star", "x" * 500, ""]}).items():
        torch.testing.assert_close(alone[name][0], value[0])


def test_null_is_the_empty_caption(text):
    null = text.unconditional({"caption": ["a big red star", "a small red star"]})
    empty = text({"caption": ["", ""]})
    assert null.keys() == empty.keys()
    for name in null:
        torch.testing.assert_close(null[name], empty[name])
    assert not torch.allclose(null["context"], text({"caption": CAPTIONS[:2]})["context"])


def test_dropout_drops_the_share_asked(text, monkeypatch):
    text.dropout = 0.3
    asked, num = [], 8000
    monkeypatch.setattr(text, "tokenize", lambda captions: asked.append(captions) or torch.full((num, 1), 2))
    text({"caption": ["a big red star"] * num}, Draw.of(0, num))
    assert set(asked[0]) == {"", "a big red star"}
    assert asked[0].count("") / num == pytest.approx(0.3, abs=5 * (0.21 / num) ** 0.5)


def test_dropout_goes_by_sample_and_only_with_a_draw(text):
    text.dropout = 0.5
    ids = torch.arange(64)
    captions = ["a big red star"] * 64
    whole = text({"caption": captions}, Draw(0, ids, ids * 0))["context"]
    turned = text({"caption": captions}, Draw(0, ids.flip(0), ids * 0))["context"]
    torch.testing.assert_close(turned.flip(0), whole)
    later = text({"caption": captions}, Draw(0, ids, ids * 0 + 1))["context"]
    assert not torch.allclose(later, whole)
    plain = text({"caption": captions})["context"]
    torch.testing.assert_close(plain, plain[:1].expand_as(plain))


@pytest.mark.parametrize("share", [0.0, 1.0])
def test_dropout_of_none_and_of_all(text, share):
    text.dropout = share
    context = text({"caption": ["a big red star"] * 512}, Draw.of(0, 512))["context"]
    caption = "" if share else "a big red star"
    torch.testing.assert_close(context, text({"caption": [caption]})["context"].expand_as(context))


def test_a_small_encoder_learns(text):
    text({"caption": CAPTIONS})["context"].square().sum().backward()
    gradients = {name: float(p.grad.norm()) for name, p in text.named_parameters() if name.endswith("weight")}
    assert len(gradients) > 8
    assert all(gradients.values()), gradients


def test_a_pretrained_encoder_is_the_one_in_the_folder(clip_folder, tokenizer):
    conditioner = Text(clip_folder, trained=False, width=16, max_tokens=20)
    conditioner.prepare(Path("/nonexistent"), lambda: pytest.fail("it has its own tokenizer"))
    ids = tokenizer(CAPTIONS, padding="max_length", max_length=20, return_tensors="pt").input_ids
    expected = CLIPTextModel.from_pretrained(clip_folder)(input_ids=ids).last_hidden_state
    torch.testing.assert_close(conditioner({"caption": CAPTIONS})["context"], expected)


@pytest.mark.parametrize("trained", [True, False])
def test_an_encoder_saved_in_half_precision_is_used_in_float32(clip_folder, tmp_path, trained):
    folder = tmp_path / "half"
    shutil.copytree(clip_folder, folder)
    CLIPTextModel.from_pretrained(clip_folder).half().save_pretrained(folder)
    conditioner = Text(str(folder), trained=trained, width=16, max_tokens=20)
    assert {p.dtype for p in conditioner.parameters()} == {torch.float32}
    assert conditioner({"caption": CAPTIONS})["context"].dtype == torch.float32


def test_frozen_means_no_gradients(clip_folder):
    frozen = Text(clip_folder, trained=False, width=16, max_tokens=20)
    assert not frozen({"caption": CAPTIONS})["context"].requires_grad
    assert not any(p.requires_grad for p in frozen.parameters())
    trained = Text(clip_folder, trained=True, width=16, max_tokens=20)
    trained({"caption": CAPTIONS})["context"].sum().backward()
    assert any(p.grad is not None for p in trained.parameters())


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        ({"trained": False}, "trained=false needs conditioner.pretrained"),
        ({"pretrained": "/nonexistent"}, "pretrained: no folder /nonexistent; it wants a local CLIP text model"),
        ({"pretrained": "CLIP"}, "conditioner.width is 192, but .* has 16"),
        ({"pretrained": "CLIP", "width": 16}, "conditioner.max_tokens is 77, but .* reads at most 20"),
        ({"vocab_size": 100}, "conditioner.vocab_size=100: .* at least 259"),
    ],
)
def test_what_cannot_work_is_refused(arguments, told, clip_folder):
    if arguments.get("pretrained") == "CLIP":
        arguments = arguments | {"pretrained": clip_folder}
    with pytest.raises(ConfigError, match=told):
        Text(**arguments)


def test_a_folder_that_holds_no_model_is_named(tmp_path):
    with pytest.raises(ConfigError, match=f"conditioner.pretrained: {tmp_path} cannot be read"):
        Text(str(tmp_path))
