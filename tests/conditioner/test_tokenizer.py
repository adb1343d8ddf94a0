"""A tokenizer for any text, learned once by however many processes, and captions of one length."""

import multiprocessing
import unicodedata
from pathlib import Path

import pytest
import torch

from sdtrain.conditioner import tokenizer as tokenizers
from sdtrain.conditioner.tokenizer import Tokens, learned_tokenizer, train_tokenizer

CAPTIONS = [f"a {size} {colour} star" for size in ("big", "small") for colour in ("red", "blue")]
STRANGE = ["", "  two  spaces ", "日本語", "🟥🔷", "naïve café — “quotes”", "\x00\x07\n\t", "x" * 5000, "A RED STAR"]


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer(CAPTIONS, 300)


@pytest.mark.parametrize("caption", STRANGE)
def test_it_writes_any_text(tokenizer, caption):
    ids = tokenizer(caption).input_ids
    assert (ids[0], ids[-1]) == (2, 1)
    assert max(ids) < 300
    said = tokenizer.decode(ids[1:-1])
    assert said.strip() == unicodedata.normalize("NFC", caption).lower().strip()


def test_frequent_words_are_one_token_and_capitals_do_not_matter(tokenizer):
    assert len(tokenizer("a big red star").input_ids) == 4 + 2
    assert tokenizer("A Big RED star").input_ids == tokenizer("a big red star").input_ids


def test_the_same_captions_give_the_same_bytes(tokenizer, tmp_path):
    for name in "ab":
        train_tokenizer(CAPTIONS, 300).save_pretrained(tmp_path / name)
    for file in (tmp_path / "a").iterdir():
        assert file.read_bytes() == (tmp_path / "b" / file.name).read_bytes()


def test_the_second_reads_what_the_first_learned(tmp_path):
    first = learned_tokenizer(tmp_path, lambda: CAPTIONS, 300)
    again = learned_tokenizer(tmp_path, lambda: pytest.fail("it learned the captions again"), 300)
    assert [again(text).input_ids for text in CAPTIONS + STRANGE] == [first(t).input_ids for t in CAPTIONS + STRANGE]
    assert [path.name for path in tmp_path.iterdir()] == ["tokenizer"]


def test_who_comes_second_takes_the_firsts(tmp_path, monkeypatch):
    """Another rank finishes while this one still learns: nothing of the finished one is touched, none is left over."""

    def learn(captions, vocab_size):
        train_tokenizer(CAPTIONS, 265).save_pretrained(tmp_path / "tokenizer")
        return train_tokenizer(captions, vocab_size)

    monkeypatch.setattr(tokenizers, "train_tokenizer", learn)
    assert len(learned_tokenizer(tmp_path, lambda: CAPTIONS, 300)) == 265
    assert [path.name for path in tmp_path.iterdir()] == ["tokenizer"]


def test_a_half_written_one_is_never_seen(tmp_path, monkeypatch):
    def fail(self, path):
        Path(path).mkdir(parents=True)
        raise KeyboardInterrupt

    monkeypatch.setattr(tokenizers.PreTrainedTokenizerFast, "save_pretrained", fail)
    with pytest.raises(KeyboardInterrupt):
        learned_tokenizer(tmp_path, lambda: CAPTIONS, 300)
    assert not (tmp_path / "tokenizer").exists()


def test_a_directory_that_cannot_be_written_is_no_race(tmp_path, monkeypatch):
    monkeypatch.setattr(tokenizers.os, "rename", lambda *_: (_ for _ in ()).throw(PermissionError("no")))
    with pytest.raises(PermissionError):
        learned_tokenizer(tmp_path, lambda: CAPTIONS, 300)


def _learn(directory, barrier, queue):
    barrier.wait()
    queue.put(learned_tokenizer(directory, lambda: CAPTIONS, 300)("a big red star").input_ids)


def test_several_processes_at_once(tmp_path):
    context = multiprocessing.get_context("fork")
    barrier, queue = context.Barrier(4), context.Queue()
    ranks = [context.Process(target=_learn, args=(tmp_path, barrier, queue)) for _ in range(4)]
    for rank in ranks:
        rank.start()
    found = [queue.get(timeout=30) for _ in ranks]
    for rank in ranks:
        rank.join(30)
    assert [rank.exitcode for rank in ranks] == [0] * 4
    assert found == [found[0]] * 4
    assert [path.name for path in tmp_path.iterdir()] == ["tokenizer"]


def test_captions_are_cut_and_padded_to_one_length(tokenizer):
    ids, mask = Tokens(tokenizer, 12)(["a big red star", "x" * 500, ""])
    assert ids.shape == mask.shape == (3, 12)
    assert ids[0].tolist()[6:] == [0] * 6
    assert ids[1, 0] == 2
    assert ids[1, -1] == 1  # a long caption still ends
    assert ids[2].tolist() == [2, 1] + [0] * 10
    assert mask.sum(1).tolist() == [6, 12, 2]
    assert mask[0].tolist() == [True] * 6 + [False] * 6


def test_what_is_cut_is_counted(tokenizer):
    tokens = Tokens(tokenizer, 6)
    tokens(["a big red star", "a big red star", "a big red star star", ""])  # 6 with both marks, 7, 2
    tokens(["a big red star star"])
    assert (tokens.num_cut, tokens.num_read) == (1, 2)


def test_padding_is_the_tokenizers_own(tokenizer):
    ids, mask = Tokens(tokenizer, 12)(CAPTIONS + STRANGE)
    own = tokenizer(CAPTIONS + STRANGE, padding="max_length", truncation=True, max_length=12, return_tensors="pt")
    assert torch.equal(ids, own.input_ids)
    assert torch.equal(mask, own.attention_mask.bool())


def test_a_full_memory_loses_no_caption(tokenizer, monkeypatch):
    monkeypatch.setattr(tokenizers, "_MAX_REMEMBERED", 10)
    tokens = Tokens(tokenizer, 12)
    known, _ = tokens(["a big red star"])
    tokens._known |= {str(n): [0] for n in range(10)}
    ids, _ = tokens(["a big red star", "a small blue star"])
    assert tokens._known.keys() == {"a big red star", "a small blue star"}
    assert torch.equal(ids[:1], known)
