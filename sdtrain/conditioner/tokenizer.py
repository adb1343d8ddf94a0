"""Captions as numbers: a tokenizer learned from captions or read from a folder, and a memory of what it said."""

from __future__ import annotations

import os
import shutil
import uuid
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from torch import Tensor
from transformers import PreTrainedTokenizerFast

_START, _END, _PAD = "<|startoftext|>", "<|endoftext|>", "<|pad|>"
# Of a learned tokenizer. The end is not 2, which transformers' CLIP takes for "unknown".
LEARNED_IDS = {"pad_token_id": 0, "eos_token_id": 1, "bos_token_id": 2}
_MAX_REMEMBERED = 200_000  # captions


def train_tokenizer(captions: Sequence[str], vocab_size: int) -> PreTrainedTokenizerFast:
    """A byte-level BPE (Sennrich et al. 2016) learned from captions: any text can be written in it, frequent words
    are one token.
    """
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.Sequence([normalizers.NFC(), normalizers.Lowercase()])
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.train_from_iterator(
        captions,
        trainers.BpeTrainer(
            vocab_size=vocab_size,
            special_tokens=[_PAD, _END, _START],  # numbered as LEARNED_IDS
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        ),
    )
    start, end = (tokenizer.token_to_id(token) for token in (_START, _END))
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{_START} $A {_END}", special_tokens=[(_START, start), (_END, end)]
    )
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token=_START, eos_token=_END, pad_token=_PAD)


def learned_tokenizer(
    directory: Path, captions: Callable[[], Sequence[str]], vocab_size: int
) -> PreTrainedTokenizerFast:
    """The tokenizer in DIR/tokenizer, learned from the captions and written there first where there is none.

    Several processes may do this at once: each writes a folder of its own, the first to rename it is read by all.
    """
    path = directory / "tokenizer"
    if not path.exists():
        part = directory / f"tokenizer.{uuid.uuid4().hex}.tmp"
        train_tokenizer(captions(), vocab_size).save_pretrained(part)
        try:
            os.rename(part, path)
        except OSError:
            shutil.rmtree(part)
            if not path.exists():
                raise
    return PreTrainedTokenizerFast.from_pretrained(path)


class Tokens:
    """Captions -> numbers of one length, each caption read once.

    Args:
        tokenizer: of transformers, with marks for the end and for padding.
        max_tokens: captions are cut or padded to this, so that a sample's condition does not depend on its batch.

    `num_read` is how many different captions it was given that say something, `num_cut` how many of those are longer.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerFast, max_tokens: int) -> None:
        self.tokenizer, self.max_tokens = tokenizer, max_tokens
        self._known: dict[str, list[int]] = {}  # without padding
        self.num_read = self.num_cut = 0

    def __call__(self, captions: Sequence[str]) -> tuple[Tensor, Tensor]:
        """(B, max_tokens) int64, and which of them are no padding, bool."""
        if len(self._known) > _MAX_REMEMBERED:
            self._known.clear()
        for text in set(captions) - self._known.keys():
            self._known[text] = self._read(text)
        lines = [self._known[text] for text in captions]
        pad = self.tokenizer.pad_token_id
        ids = torch.tensor([line + [pad] * (self.max_tokens - len(line)) for line in lines])
        lengths = torch.tensor([len(line) for line in lines])
        return ids, torch.arange(self.max_tokens) < lengths[:, None]  # (B, L), (B, L)

    def _read(self, text: str) -> list[int]:
        self.num_read += text != ""
        whole = self.tokenizer(text, verbose=False).input_ids
        if len(whole) <= self.max_tokens:
            return whole
        self.num_cut += 1
        return self.tokenizer(text, truncation=True, max_length=self.max_tokens).input_ids  # it still ends
