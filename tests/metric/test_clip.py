"""CLIP from a local folder: what transformers itself computes, of unit length."""

import json
import shutil

import pytest
import torch

from sdtrain.errors import ConfigError
from sdtrain.metric.clip import MEAN, STD, Clip


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    from transformers import CLIPConfig, CLIPModel, CLIPTokenizer

    folder = tmp_path_factory.mktemp("clip")
    size = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    letters = [*"abcdefghijklmnopqrstuvwxyz"]
    tokens = [*letters, *(f"{letter}</w>" for letter in letters), "<|startoftext|>", "<|endoftext|>"]
    text = {**size, "vocab_size": len(tokens), "max_position_embeddings": 12}
    text |= {"bos_token_id": len(tokens) - 2, "eos_token_id": len(tokens) - 1, "pad_token_id": len(tokens) - 1}
    config = CLIPConfig(text_config=text, vision_config={**size, "image_size": 8, "patch_size": 4}, projection_dim=8)
    torch.manual_seed(0)
    CLIPModel(config).save_pretrained(folder)
    (folder / "vocab.json").write_text(json.dumps({token: i for i, token in enumerate(tokens)}))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    CLIPTokenizer.from_pretrained(folder, local_files_only=True).save_pretrained(folder)
    return folder


def test_features_and_scores_are_transformers(folder):
    clip = Clip(str(folder))
    pictures = torch.randint(0, 256, (2, 3, 8, 8), dtype=torch.uint8)
    features = clip(pictures)
    assert torch.allclose(features.norm(dim=1), torch.ones(2))
    pixels = (pictures / 255 - torch.tensor(MEAN)[:, None, None]) / torch.tensor(STD)[:, None, None]
    captions = ["star", "ring"]
    ids = clip._tokenize(captions)
    with torch.no_grad():
        whole = clip.network(pixel_values=pixels, input_ids=ids["input_ids"], attention_mask=ids["attention_mask"])
    assert torch.allclose(features, whole.image_embeds, atol=1e-5)
    expected = 100 * (whole.text_embeds * whole.image_embeds).sum(dim=1).clamp(min=0)
    assert torch.allclose(clip.score(features, captions), expected, atol=1e-3)
    assert not torch.allclose(whole.text_embeds[0], whole.text_embeds[1])
    text = whole.text_embeds
    assert torch.allclose(clip.score(text, captions), torch.full((2,), 100.0), atol=1e-3)
    assert clip.score(-text, captions).tolist() == [0, 0]
    torch.testing.assert_close(clip.texts(captions), text)


def test_larger_pictures_are_resized_and_long_captions_cut(folder):
    clip = Clip(str(folder))
    features = clip(torch.zeros(1, 3, 40, 40, dtype=torch.uint8))
    assert features.shape == (1, clip.num_features)
    assert clip.score(features, ["star " * 50]).shape == (1,)


def test_what_is_missing_is_named(tmp_path):
    with pytest.raises(ConfigError, match=r"no file .*config.json; it wants a folder"):
        Clip(str(tmp_path))
    (tmp_path / "config.json").write_text("{")
    (tmp_path / "model.safetensors").write_text("x")
    with pytest.raises(ConfigError, match="cannot be read"):
        Clip(str(tmp_path))


def test_a_damaged_file_is_named(folder, tmp_path):
    shutil.copytree(folder, tmp_path / "clip")
    (tmp_path / "clip" / "model.safetensors").write_bytes(b"x")
    with pytest.raises(ConfigError, match="cannot be read"):
        Clip(str(tmp_path / "clip"))
