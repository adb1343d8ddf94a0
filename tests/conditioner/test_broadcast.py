"""Text by concatenation to the input, beside cross-attention or alone."""

import pytest
import torch

from sdtrain.build import build
from sdtrain.conditioner.broadcast import Broadcast
from sdtrain.conditioner.text import Text
from sdtrain.config import load_config
from sdtrain.errors import ConfigError
from sdtrain.ops.random import Draw

SMALL = {"width": 16, "num_layers": 1, "num_heads": 2, "vocab_size": 270, "max_tokens": 8}
BATCH = {"caption": ["a star", "a square"], "latent_size": (6, 4)}


def make(directory, text, width):
    conditioner = Broadcast(text, width)
    conditioner.prepare(directory, lambda: BATCH["caption"])
    return conditioner


def test_the_pooled_text_at_every_place(tmp_path):
    text = Text(pooled_width=12, dropout=0.5, **SMALL)
    both, alone = make(tmp_path, text, 16), make(tmp_path, text, None)
    said = text(BATCH)
    assert both(BATCH).keys() == {"context", "concat"}
    assert alone(BATCH).keys() == alone.unconditional(BATCH).keys() == {"concat"}
    torch.testing.assert_close(both(BATCH)["context"], said["context"])
    for told in (both(BATCH), alone(BATCH)):
        torch.testing.assert_close(told["concat"], said["pooled"][:, :, None, None].expand(2, 12, 6, 4))
    null = text.unconditional(BATCH)["pooled"]
    torch.testing.assert_close(both.unconditional(BATCH)["concat"][:, :, 5, 3], null)
    torch.testing.assert_close(both(BATCH, Draw.of(1, 2))["concat"][:, :, 0, 0], text(BATCH, Draw.of(1, 2))["pooled"])


def test_masked_padding_stays_with_the_context(tmp_path):
    text = Text(pooled_width=16, masked=True, **SMALL)
    assert make(tmp_path, text, 16)(BATCH).keys() == {"context", "context_mask", "concat"}
    assert make(tmp_path, text, None)(BATCH).keys() == {"concat"}


def test_a_unet_reads_it(tmp_path):
    overrides = ["conditioner=text_concat", *(f"conditioner.text.{name}={value}" for name, value in SMALL.items())]
    model = [
        "model=unet_tiny",
        "model.in_channels=68",
        "model.block_out_channels=[32,32]",
        "model.class_embed_type=null",
    ]
    cfg = load_config([*overrides, *model, "first_stage=autoencoder_kl_tiny"])
    conditioner, network = build(cfg.conditioner), build(cfg.model)
    conditioner.prepare(tmp_path, lambda: BATCH["caption"])
    x = torch.randn(2, 4, 6, 4)
    assert network(x, torch.tensor([1.0, 2.0]), conditioner(BATCH)).shape == x.shape


def test_what_cannot_work_is_refused():
    with pytest.raises(ConfigError, match="text.pooled_width is null"):
        Broadcast(Text(**SMALL), 16)
    with pytest.raises(ConfigError, match="width is 20, but text has 16"):
        Broadcast(Text(pooled_width=16, **SMALL), 20)
