"""Text as a condition: a CLIP text model (Radford et al. 2021), pretrained from a local folder or small and trained
jointly.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModel, PreTrainedTokenizerFast

from sdtrain.contracts import Batch, Conditioning
from sdtrain.errors import ConfigError
from sdtrain.ops.random import Draw

_START, _END, _PAD = "<|startoftext|>", "<|endoftext|>", "<|pad|>"


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
            special_tokens=[_PAD, _START, _END],
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        ),
    )
    start, end = (tokenizer.token_to_id(token) for token in (_START, _END))
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{_START} $A {_END}", special_tokens=[(_START, start), (_END, end)]
    )
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token=_START, eos_token=_END, pad_token=_PAD)


class Text(nn.Module):
    """Captions -> the last hidden states of a CLIP text model, (B, max_tokens, width). The null condition is the
    empty caption.

    Args:
        pretrained: a local folder with a CLIP text model and its tokenizer; null builds a small one, whose tokenizer
            is learned
            from the training captions.
        trained: whether its weights learn. A model from nothing always must.
        dropout: share of the training captions that are replaced by the empty one (Ho and Salimans 2021, algorithm 1).
        width, num_layers, num_heads, vocab_size: of the small one.
        max_tokens: captions are cut or padded to this, so that a sample's condition does not depend on its batch.

    Raises:
        ConfigError: where `pretrained` is not such a folder, or a frozen model would be untrained.
    """

    def __init__(
        self,
        pretrained: str | None = None,
        trained: bool = True,
        dropout: float = 0.1,
        width: int = 192,
        num_layers: int = 2,
        num_heads: int = 3,
        vocab_size: int = 2048,
        max_tokens: int = 77,
    ) -> None:
        super().__init__()
        self.dropout, self.max_tokens, self.vocab_size, self.trained = dropout, max_tokens, vocab_size, trained
        self._ids: dict[str, list[int]] = {}
        if pretrained is None:
            if not trained:
                raise ConfigError(
                    "conditioner.trained=false needs conditioner.pretrained: an untrained encoder says nothing"
                )
            if vocab_size < 259:
                raise ConfigError(f"conditioner.vocab_size={vocab_size}: the bytes and marks alone are at least 259")
            self.tokenizer = None
            self.encoder = CLIPTextModel(
                CLIPTextConfig(
                    vocab_size=vocab_size,
                    hidden_size=width,
                    intermediate_size=4 * width,
                    num_hidden_layers=num_layers,
                    num_attention_heads=num_heads,
                    max_position_embeddings=max_tokens,
                    pad_token_id=0,
                    bos_token_id=1,
                    eos_token_id=2,
                    attn_implementation="eager",  # quicker at these lengths on a CPU
                )
            )
        else:
            self.tokenizer, self.encoder = _load(pretrained)
            if width != self.encoder.config.hidden_size:
                raise ConfigError(
                    f"conditioner.width is {width}, but {pretrained} has {self.encoder.config.hidden_size}"
                )
            longest = self.encoder.config.max_position_embeddings
            if max_tokens > longest:
                raise ConfigError(f"conditioner.max_tokens is {max_tokens}, but {pretrained} reads at most {longest}")
        self.encoder.requires_grad_(trained)

    def prepare(self, directory: Path, captions: Callable[[], Sequence[str]]) -> None:
        """Loads the tokenizer from DIR, or learns it from the captions and writes it there. A pretrained one has its
        own.
        """
        if self.tokenizer is not None:
            return
        path = directory / "tokenizer"
        if not path.exists():
            train_tokenizer(captions(), self.vocab_size).save_pretrained(path)
        self.tokenizer = PreTrainedTokenizerFast.from_pretrained(path)

    def tokenize(self, captions: Sequence[str]) -> Tensor:
        """(B, max_tokens) int64, cut and padded."""
        if self.tokenizer is None:
            raise RuntimeError("prepare() gives the conditioner its tokenizer first")
        if len(self._ids) > 200_000:
            self._ids.clear()
        for text in set(captions) - self._ids.keys():
            self._ids[text] = self.tokenizer(
                text, padding="max_length", truncation=True, max_length=self.max_tokens
            ).input_ids
        return torch.tensor([self._ids[text] for text in captions])

    def forward(self, batch: Batch, draw: Draw | None = None) -> Conditioning:
        """A batch's captions -> {"context": (B, max_tokens, width)}; with a draw, some of them dropped."""
        captions = batch["caption"]
        if draw is not None and self.dropout > 0:
            dropped = (draw.uniform("condition_dropout") < self.dropout).tolist()
            captions = ["" if drop else text for text, drop in zip(captions, dropped)]
        ids = self.tokenize(captions).to(self.encoder.device)
        with torch.set_grad_enabled(self.trained and torch.is_grad_enabled()):
            states = self.encoder(input_ids=ids).last_hidden_state  # (B, L, D)
        # Attention is causal: the end token alone has read all. Not transformers' pooler_output, which takes the token
        # of the highest number for it where the configured number is 2.
        end = (ids == self.tokenizer.eos_token_id).int().argmax(dim=1)
        return {"context": states, "pooled": states[torch.arange(len(captions), device=ids.device), end]}

    def unconditional(self, batch: Batch) -> Conditioning:
        """The null condition for as many samples."""
        null = self({"caption": [""]})
        return {name: value.expand(len(batch["caption"]), *value.shape[1:]) for name, value in null.items()}


def _load(folder: str) -> tuple[PreTrainedTokenizerFast, CLIPTextModel]:
    from transformers import AutoTokenizer

    if not Path(folder).is_dir():
        raise ConfigError(
            f"conditioner.pretrained: no folder {folder}; it wants a local CLIP text model (config.json, "
            "model.safetensors, tokenizer files), such as text_encoder and tokenizer of openai/clip-vit-large-patch14"
        )
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
        # float32 whatever it was saved in: transformers would keep float16.
        return tokenizer, CLIPTextModel.from_pretrained(folder, local_files_only=True, use_safetensors=True).float()
    except (OSError, ValueError) as error:
        raise ConfigError(f"conditioner.pretrained: {folder} cannot be read: {str(error).splitlines()[0]}") from error
