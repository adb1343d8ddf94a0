"""Pretrained CLIP text models: what transformers says of every layer, frozen or trained, and what is refused."""

import shutil

import pytest
import torch
from transformers import AutoTokenizer, CLIPTextModel, CLIPTextModelWithProjection
from transformers.models.clip.modeling_clip import CLIPModel

from sdtrain.conditioner.clip import CLIP
from sdtrain.errors import ConfigError

CLIP_L = {"width": 16, "max_tokens": 20}
BIGG = {"width": 24, "pooled_width": 20, "max_tokens": 20}
KINDS = [("text_encoder", CLIPTextModel, CLIP_L), ("text_encoder_2", CLIPTextModelWithProjection, BIGG)]


def tokenized(folder, captions):
    tokenizer = AutoTokenizer.from_pretrained(folder.replace("text_encoder", "tokenizer"))
    return tokenizer(captions, padding="max_length", truncation=True, max_length=20, return_tensors="pt").input_ids


@pytest.mark.parametrize(("name", "kind", "values"), KINDS)
@pytest.mark.parametrize("layer", ["last", "penultimate", "penultimate_norm"])
def test_the_states_are_transformers_own(sdxl_folder, captions, name, kind, values, layer):
    folder = f"{sdxl_folder}/{name}"
    model = kind.from_pretrained(folder)
    out = model(input_ids=tokenized(folder, captions), output_hidden_states=True)
    inner = getattr(model, "text_model", model)
    expected = {
        "last": out.last_hidden_state,
        "penultimate": out.hidden_states[-2],
        "penultimate_norm": inner.final_layer_norm(out.hidden_states[-2]),
    }
    told = CLIP(folder, layer=layer, **values)({"caption": captions})
    torch.testing.assert_close(told["context"], expected[layer], rtol=0, atol=1e-6)
    if kind is CLIPTextModelWithProjection:
        torch.testing.assert_close(told["pooled"], out.text_embeds, rtol=0, atol=1e-6)
    else:
        assert told.keys() == {"context"}


def test_pooled_without_a_projection_is_the_end_tokens_state(sdxl_folder, captions):
    folder = f"{sdxl_folder}/text_encoder"
    expected = CLIPTextModel.from_pretrained(folder)(input_ids=tokenized(folder, captions)).pooler_output
    told = CLIP(folder, pooled_width=16, layer="penultimate", **CLIP_L)({"caption": captions})
    torch.testing.assert_close(told["pooled"], expected, rtol=0, atol=1e-6)


def test_the_end_token_is_the_tokenizers_whatever_the_config_says(sdxl_folder, captions, edited):
    """OpenAI's and all older configs say eos_token_id=2, which is none of the tokenizer's."""
    folder = f"{sdxl_folder}/text_encoder_2"
    whole = CLIP(folder, **BIGG)({"caption": captions})["pooled"]
    old = edited(folder, eos_token_id=2)
    shutil.copytree(f"{sdxl_folder}/tokenizer_2", old, dirs_exist_ok=True)
    torch.testing.assert_close(CLIP(str(old), **BIGG)({"caption": captions})["pooled"], whole)


def test_a_23_layer_model_is_the_penultimate_of_its_24(sdxl_folder, captions, edited):
    """How diffusers holds SD 2's encoder."""
    folder = f"{sdxl_folder}/text_encoder"
    cut = edited(folder, num_hidden_layers=2)
    shutil.copytree(f"{sdxl_folder}/tokenizer", cut, dirs_exist_ok=True)
    whole = CLIP(folder, layer="penultimate_norm", **CLIP_L)({"caption": captions})
    torch.testing.assert_close(CLIP(str(cut), **CLIP_L)({"caption": captions})["context"], whole["context"])


def test_a_whole_clip_gives_its_text_half_with_the_projection(sdxl_folder, captions, tmp_path):
    encoder = CLIPTextModelWithProjection.from_pretrained(f"{sdxl_folder}/text_encoder_2")
    vision = {
        "hidden_size": 8,
        "intermediate_size": 8,
        "num_hidden_layers": 1,
        "num_attention_heads": 1,
        "image_size": 32,
    }
    kind = CLIPModel.config_class
    clip = CLIPModel(kind(text_config=encoder.config.to_dict(), vision_config=vision, projection_dim=20))
    clip.text_model.load_state_dict(encoder.text_model.state_dict())
    clip.text_projection.load_state_dict(encoder.text_projection.state_dict())
    clip.save_pretrained(tmp_path)
    shutil.copytree(f"{sdxl_folder}/tokenizer_2", tmp_path, dirs_exist_ok=True)
    told = CLIP(str(tmp_path), **BIGG)({"caption": captions})
    for name, value in CLIP(f"{sdxl_folder}/text_encoder_2", **BIGG)({"caption": captions}).items():
        torch.testing.assert_close(told[name], value)


def test_frozen_is_out_of_the_parameters_and_the_state(sdxl_folder, captions):
    frozen = CLIP(f"{sdxl_folder}/text_encoder_2", **BIGG).train()
    assert list(frozen.parameters()) == []
    assert frozen.state_dict() == {}
    assert not frozen.encoder.training
    assert not any(p.requires_grad for p in frozen.encoder.parameters())
    assert not any(value.requires_grad for value in frozen({"caption": captions}).values())


def test_trained_learns_all_that_is_read(sdxl_folder, captions):
    trained = CLIP(f"{sdxl_folder}/text_encoder_2", trained=True, layer="penultimate", **BIGG)
    sum(value.sum() for value in trained({"caption": captions}).values()).backward()
    assert [name for name, p in trained.named_parameters() if p.grad is None] == []
    assert all(name.startswith("encoder.") for name in trained.state_dict())
    unpooled = CLIP(f"{sdxl_folder}/text_encoder_2", True, width=24, max_tokens=20)
    unpooled({"caption": captions})["context"].sum().backward()
    assert {name for name, p in unpooled.named_parameters() if p.grad is None} == {"encoder.text_projection.weight"}
    assert not unpooled.encoder.text_projection.weight.requires_grad


@pytest.mark.parametrize("trained", [True, False])
def test_precision(sdxl_folder, captions, tmp_path, trained):
    """One that trains is in float32; a frozen one stays as it was saved, and what it says is float32."""
    shutil.copytree(f"{sdxl_folder}/tokenizer", tmp_path / "tokenizer")
    CLIPTextModel.from_pretrained(f"{sdxl_folder}/text_encoder").bfloat16().save_pretrained(tmp_path / "text_encoder")
    clip = CLIP(str(tmp_path / "text_encoder"), trained, **CLIP_L).double().float()
    assert clip.encoder.dtype == (torch.float32 if trained else torch.bfloat16)
    told = clip({"caption": captions})["context"]
    assert told.dtype == torch.float32
    whole = CLIP(f"{sdxl_folder}/text_encoder", **CLIP_L)({"caption": captions})["context"]
    assert torch.nn.functional.cosine_similarity(told, whole, dim=-1).min() > 0.99


def test_an_empty_caption_can_say_zeros(sdxl_folder):
    clip = CLIP(f"{sdxl_folder}/text_encoder_2", empty_caption="zeros", masked=True, **BIGG)
    told = clip({"caption": ["a", "", "b"]})
    for name in ("context", "pooled"):
        assert told[name].flatten(1).any(1).tolist() == [True, False, True]
    null = clip.unconditional({"caption": ["a", "b"]})
    assert null["context"].shape == (2, 20, 24)
    assert not null["context"].any()
    assert null["context_mask"].any(1).all()  # a row with nothing to attend to would be NaN


@pytest.mark.parametrize(
    ("values", "told"),
    [
        ({}, "width is 768, but .* has 16"),
        ({"width": 16}, "max_tokens is 77, but .* reads at most 20"),
        ({"width": 16, "max_tokens": 20, "pooled_width": 20}, "pooled_width is 20, but .* has 16"),
    ],
)
def test_widths_that_are_not_the_models_are_refused(sdxl_folder, values, told):
    with pytest.raises(ConfigError, match=told):
        CLIP(f"{sdxl_folder}/text_encoder", **values)
