"""Text encoders as small as they can be, saved as transformers saves them."""

import json

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    PreTrainedTokenizerFast,
    T5Config,
    T5EncoderModel,
)

CAPTIONS = ["a big red star", "", "two small blue squares on a white background, " * 9]


def save_clip(folder, kind, pad="<|endoftext|>", tokenizer_folder=None, seed=0, **values):
    """A CLIP text model and CLIP's own tokenizer over single letters; the end token has the highest number."""
    letters = [chr(c) for c in range(97, 123)] + [*"!,."]
    words = [*letters, *(f"{c}</w>" for c in letters), "<|startoftext|>", "<|endoftext|>"]
    vocab = {word: number for number, word in enumerate(words)}
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer = CLIPTokenizer(vocab=vocab, merges=[], pad_token=pad, model_max_length=20)
    tokenizer.save_pretrained(tokenizer_folder or folder)
    torch.manual_seed(seed)
    config = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 3, "num_attention_heads": 2} | values
    config = CLIPTextConfig(
        vocab_size=len(vocab),
        max_position_embeddings=20,
        bos_token_id=vocab["<|startoftext|>"],
        eos_token_id=vocab["<|endoftext|>"],
        **config,
    )
    model = kind(config)
    with torch.no_grad():  # biases and norms as of a trained one
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    model.save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="session")
def captions():
    return CAPTIONS


@pytest.fixture(scope="session")
def sdxl_folder(tmp_path_factory):
    """CLIP-L without a projection, and an OpenCLIP (gelu, padded with another token) with one, in diffusers' layout."""
    root = tmp_path_factory.mktemp("sdxl")
    save_clip(root / "text_encoder", CLIPTextModel, tokenizer_folder=root / "tokenizer")
    bigg = {"hidden_size": 24, "projection_dim": 20, "hidden_act": "gelu"}
    second = (root / "text_encoder_2", CLIPTextModelWithProjection)
    save_clip(*second, pad="!", tokenizer_folder=root / "tokenizer_2", seed=1, **bigg)
    return str(root)


@pytest.fixture(scope="session")
def sd3_folder(tmp_path_factory):
    """Two CLIPs with projections and a T5 encoder, in diffusers' layout."""
    root = tmp_path_factory.mktemp("sd3")
    kind = CLIPTextModelWithProjection
    save_clip(root / "text_encoder", kind, tokenizer_folder=root / "tokenizer", projection_dim=16)
    bigg = {"hidden_size": 24, "projection_dim": 20, "hidden_act": "gelu"}
    save_clip(root / "text_encoder_2", kind, "!", root / "tokenizer_2", 1, **bigg)
    save_t5(root / "text_encoder_3", root / "tokenizer_3")
    return str(root)


def save_t5(folder, tokenizer_folder):
    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), *((c, -2.0) for c in "\u2581abcdefghijklmnopqrstuvwxyz,.")]
    tokenizer = Tokenizer(models.Unigram(pieces, unk_id=2))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="</s>", pad_token="<pad>", unk_token="<unk>", model_max_length=32
    )
    fast.save_pretrained(tokenizer_folder)
    torch.manual_seed(2)
    config = T5Config(
        vocab_size=40, d_model=48, d_kv=8, d_ff=32, num_layers=2, num_heads=2, feed_forward_proj="gated-gelu"
    )
    T5EncoderModel(config).save_pretrained(folder)


@pytest.fixture
def edited(tmp_path):
    """A function that copies a folder and changes values of its config.json."""

    def edit(folder, **values):
        import shutil

        copy = tmp_path / "edited"
        shutil.copytree(folder, copy)
        config = json.loads((copy / "config.json").read_text())
        (copy / "config.json").write_text(json.dumps(config | values))
        return copy

    return edit
