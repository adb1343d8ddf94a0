"""DINOv2 against the published files' layout and against transformers' own, on random weights."""

import pytest
import torch

from sdtrain.errors import ConfigError
from sdtrain.metric.dinov2 import MEAN, STD, DinoV2, VisionTransformer

BLOCK = {
    *(f"{norm}.{part}" for norm in ("norm1", "norm2") for part in ("weight", "bias")),
    *(f"{layer}.{part}" for layer in ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2") for part in ("weight", "bias")),
    *("ls1.gamma", "ls2.gamma"),
}
OTHERS = {
    *("cls_token", "pos_embed", "mask_token", "patch_embed.proj.weight", "patch_embed.proj.bias"),
    *("norm.weight", "norm.bias"),
}

NAMES = (  # transformers' and the public files'
    ("embeddings.position_embeddings", "pos_embed"),
    ("embeddings.patch_embeddings.projection", "patch_embed.proj"),
    ("embeddings.", ""),
    ("layernorm.", "norm."),
    ("encoder.layer.", "blocks."),
    ("attention.o_proj", "attn.proj"),
    ("attention.", "attn."),
    ("layer_scale1.lambda1", "ls1.gamma"),
    ("layer_scale2.lambda1", "ls2.gamma"),
)


@pytest.mark.parametrize(("width", "depth", "millions"), [(768, 12, 86.6), (1024, 24, 304.4)])
def test_the_layout_is_the_published_one(width, depth, millions):
    with torch.device("meta"):
        network = VisionTransformer(width, depth)
    assert set(network.state_dict()) == OTHERS | {f"blocks.{i}.{name}" for i in range(depth) for name in BLOCK}
    assert network.pos_embed.shape == (1, 1370, width)
    assert sum(p.numel() for p in network.parameters()) / 1e6 == pytest.approx(millions, abs=0.1)


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    torch.manual_seed(0)
    network = VisionTransformer(128, 2)
    for parameter in network.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    with torch.no_grad():
        network.pos_embed[:, 2:] = network.pos_embed[:, 1:2]  # nothing to interpolate, where transformers differs
    path = tmp_path_factory.mktemp("dinov2") / "small.pth"
    torch.save(network.state_dict(), path)
    return path


def test_features_are_transformers(small):
    from transformers import Dinov2Config, Dinov2Model

    ours = DinoV2(str(small))
    config = Dinov2Config(
        hidden_size=128, num_hidden_layers=2, num_attention_heads=2, image_size=518, patch_size=14, layer_norm_eps=1e-6
    )
    theirs, state, mapped = Dinov2Model(config).eval(), ours.network.state_dict(), {}
    for name in theirs.state_dict():
        source = name
        for old, new in NAMES:
            source = source.replace(old, new)
        place = next((i for i, letter in enumerate("qkv") if f"attn.{letter}_proj" in source), None)
        if place is None:
            mapped[name] = state[source]
        else:
            mapped[name] = state[source.replace(f"{'qkv'[place]}_proj", "qkv")].chunk(3)[place]
    theirs.load_state_dict(mapped)
    pictures = torch.randint(0, 256, (2, 3, 224, 224), dtype=torch.uint8)
    pixels = (pictures / 255 - torch.tensor(MEAN)[:, None, None]) / torch.tensor(STD)[:, None, None]
    with torch.no_grad():
        expected = theirs(pixels).pooler_output
    assert torch.allclose(ours(pictures), expected, atol=1e-4)
    assert ours(pictures[..., :60, :60]).shape == (2, 128)


def test_positions_are_those_of_a_smaller_picture():
    network = VisionTransformer(64, 0)
    across = torch.linspace(0, 1, 37).expand(37, 37).flatten()
    with torch.no_grad():
        network.pos_embed[0, 0], network.pos_embed[0, 1:] = 7, across[:, None]
    found = network._positions(16)
    assert found.shape == (1, 257, 64)
    assert torch.equal(found[0, 0], torch.full((64,), 7.0))
    row = found[0, 1:17, 0]
    assert (row.diff() > 0).all()
    assert torch.allclose(row, (torch.arange(16) + 0.5) / 16 * 37 / 36 - 0.5 / 36, atol=0.02)


def test_a_file_that_does_not_fit_is_named(tmp_path):
    with pytest.raises(ConfigError, match="it wants dinov2_vitl14_pretrain.pth"):
        DinoV2(str(tmp_path / "absent.pth"))
    torch.save({"cls_token": torch.zeros(1, 1, 64)}, tmp_path / "part.pth")
    with pytest.raises(ConfigError, match="does not fit"):
        DinoV2(str(tmp_path / "part.pth"))
    torch.save({"x": torch.zeros(1)}, tmp_path / "other.pth")
    with pytest.raises(ConfigError, match="without registers"):
        DinoV2(str(tmp_path / "other.pth"))
