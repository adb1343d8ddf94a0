"""Folders of transformers: found by path or in the cache, loaded whole or refused by name."""

import shutil

import huggingface_hub.constants
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import CLIPTextModel

from sdtrain.conditioner.clip import CLIP
from sdtrain.conditioner.pretrained import find_folder, load, load_tokenizer
from sdtrain.errors import ConfigError

CLIP_L = {"width": 16, "max_tokens": 20}


def refused(*arguments, told, **values):
    with pytest.raises(ConfigError, match=told) as error:
        CLIP(*arguments, **values)
    assert "\n" not in str(error.value)


def test_a_folder_that_is_not_there():
    refused(
        "/nonexistent", told="pretrained=/nonexistent: no such folder .*it wants a CLIP text model and its tokenizer"
    )


def test_a_pipelines_folder_names_its_encoders(sdxl_folder):
    refused(sdxl_folder, told=f"pretrained={sdxl_folder}: give one of its folders: text_encoder, text_encoder_2")


def test_a_name_in_the_cache(sdxl_folder, tmp_path, monkeypatch, captions):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    refused("owner/sdxl/text_encoder", told="pretrained=owner/sdxl/text_encoder: no such folder")
    snapshot = tmp_path / "models--owner--sdxl" / "snapshots" / ("0" * 40)
    shutil.copytree(sdxl_folder, snapshot)
    (tmp_path / "models--owner--sdxl" / "refs").mkdir()
    (tmp_path / "models--owner--sdxl" / "refs" / "main").write_text("0" * 40)
    assert find_folder("owner/sdxl/text_encoder", "CLIP text model") == snapshot / "text_encoder"
    told = CLIP("owner/sdxl/text_encoder", **CLIP_L)({"caption": captions})
    own = CLIP(f"{sdxl_folder}/text_encoder", **CLIP_L)({"caption": captions})
    torch.testing.assert_close(told["context"], own["context"])
    refused("owner/sdxl/nothing", told="pretrained=owner/sdxl/nothing: no such folder")


def test_no_weights(sdxl_folder, edited):
    folder = edited(f"{sdxl_folder}/text_encoder")
    (folder / "model.safetensors").unlink()
    refused(str(folder), told=f"pretrained={folder} cannot be read")


def test_weights_that_lack_one_are_not_drawn_at_random(sdxl_folder, edited):
    folder = edited(f"{sdxl_folder}/text_encoder")
    state = load_file(folder / "model.safetensors")
    name = next(name for name in state if name.endswith("layers.1.mlp.fc1.weight"))
    save_file(
        {key: value for key, value in state.items() if key != name}, folder / "model.safetensors", {"format": "pt"}
    )
    refused(str(folder), told="no whole CLIPTextModel: it lacks or misfits .*layers.1.mlp.fc1.weight")


def test_weights_of_another_shape(sdxl_folder, edited):
    folder = edited(f"{sdxl_folder}/text_encoder", intermediate_size=64)
    refused(str(folder), told=f"pretrained={folder}")


def test_no_tokenizer(sdxl_folder, edited):
    folder = edited(f"{sdxl_folder}/text_encoder")
    refused(str(folder), told=f"pretrained={folder}: there is no tokenizer", **CLIP_L)


def test_the_tokenizer_beside_is_the_encoders_own(sdxl_folder):
    folder = find_folder(f"{sdxl_folder}/text_encoder_2", "CLIP text model")
    assert load_tokenizer(folder).pad_token == "!"


def test_loading_says_nothing(sdxl_folder, capfd):
    """transformers draws bars and reports on every weight that another class would want."""
    folder = find_folder(f"{sdxl_folder}/text_encoder_2", "CLIP text model")
    load(CLIPTextModel, folder, trained=False)
    assert capfd.readouterr() == ("", "")
