"""Several conditioners as one: exactly what diffusers' SDXL and SD 3 pipelines encode, and dropped as papers say."""

import pytest
import torch
from diffusers import StableDiffusion3Pipeline, StableDiffusionPipeline, StableDiffusionXLPipeline
from transformers import AutoTokenizer, CLIPTextModel, CLIPTextModelWithProjection, T5EncoderModel

from sdtrain.build import build
from sdtrain.conditioner.clip import CLIP
from sdtrain.conditioner.composite import Composite
from sdtrain.conditioner.label import Label
from sdtrain.conditioner.size import Size
from sdtrain.conditioner.t5 import T5
from sdtrain.conditioner.text import Text
from sdtrain.config import load_config
from sdtrain.errors import ConfigError
from sdtrain.ops.random import Draw

NUM = 64
SDXL = [
    "conditioner=sdxl",
    *("conditioner.width=40", "conditioner.pooled_width=20"),
    *("conditioner.parts.clip_l.width=16", "+conditioner.parts.clip_l.max_tokens=20"),
    *("conditioner.parts.open_clip_bigg.width=24", "conditioner.parts.open_clip_bigg.pooled_width=20"),
    "+conditioner.parts.open_clip_bigg.max_tokens=20",
]
CLIPS = "conditioner.parts.clip"
SD3 = [
    "conditioner=sd3",
    *("conditioner.width=48", "conditioner.pooled_width=36", f"{CLIPS}.width=40", f"{CLIPS}.pooled_width=36"),
    *(f"{CLIPS}.parts.clip_l.width=16", f"{CLIPS}.parts.clip_l.pooled_width=16"),
    *(f"{CLIPS}.parts.open_clip_bigg.width=24", f"{CLIPS}.parts.open_clip_bigg.pooled_width=20"),
    *(f"+{CLIPS}.parts.clip_l.max_tokens=20", f"+{CLIPS}.parts.open_clip_bigg.max_tokens=20"),
    *("conditioner.parts.t5.width=48", "conditioner.parts.t5.max_tokens=32"),
]


def configured(*overrides):
    return build(load_config(list(overrides)).conditioner)


@pytest.fixture(scope="module")
def sdxl(sdxl_folder):
    return configured(*SDXL, f"conditioner.parts.clip_l.pretrained={sdxl_folder}/text_encoder")


@pytest.fixture(scope="module")
def sd3(sd3_folder):
    return configured(*SD3, f"{CLIPS}.parts.clip_l.pretrained={sd3_folder}/text_encoder")


@pytest.fixture
def batch(captions):
    return {"caption": captions, "image_size": (64, 32), "latent_size": (8, 4)}


def components(root, *kinds):
    """A pipeline's text encoders and tokenizers."""
    found = {}
    for number, kind in enumerate(kinds, start=1):
        end = "" if number == 1 else f"_{number}"
        found[f"text_encoder{end}"] = kind.from_pretrained(f"{root}/text_encoder{end}")
        found[f"tokenizer{end}"] = AutoTokenizer.from_pretrained(f"{root}/tokenizer{end}")
    return found


def assert_same(told, expected):
    for name, value in expected.items():
        torch.testing.assert_close(told[name], value, rtol=0, atol=1e-5)


def test_sd15_is_what_its_pipeline_encodes(sdxl_folder, captions):
    parts = components(sdxl_folder, CLIPTextModel)
    pipe = StableDiffusionPipeline(
        **parts, vae=None, unet=None, scheduler=None, safety_checker=None, feature_extractor=None,
        requires_safety_checker=False,
    )  # fmt: skip
    context, null = pipe.encode_prompt(captions, "cpu", 1, True)
    where = f"conditioner.pretrained={sdxl_folder}/text_encoder"
    clip = configured("conditioner=sd15", where, "conditioner.width=16", "conditioner.max_tokens=20")
    assert_same(clip({"caption": captions}), {"context": context})
    assert_same(clip.unconditional({"caption": captions}), {"context": null})


def test_sdxl_is_what_its_pipeline_encodes(sdxl, sdxl_folder, captions, batch):
    parts = components(sdxl_folder, CLIPTextModel, CLIPTextModelWithProjection)
    pipe = StableDiffusionXLPipeline(
        **parts, vae=None, unet=None, scheduler=None, force_zeros_for_empty_prompt=True, add_watermarker=False
    )
    captions = [captions[0], captions[2]]  # an empty one in the data is the null condition here
    context, null, pooled, null_pooled = pipe.encode_prompt(captions, device="cpu")
    batch = batch | {"caption": captions}
    assert_same(sdxl(batch), {"context": context, "pooled": pooled})
    assert_same(sdxl.unconditional(batch), {"context": null, "pooled": null_pooled})
    assert sdxl(batch)["sizes"].tolist() == [[64, 32, 0, 0, 64, 32]] * 2
    assert (sdxl.width, sdxl.pooled_width) == (40, 20)


@pytest.mark.parametrize("t5", [True, False])
def test_sd3_is_what_its_pipeline_encodes(sd3, sd3_folder, captions, t5):
    kinds = [CLIPTextModelWithProjection, CLIPTextModelWithProjection, T5EncoderModel]
    parts = components(sd3_folder, *kinds)
    if not t5:
        parts |= {"text_encoder_3": None, "tokenizer_3": None}
        where = f"{CLIPS}.parts.clip_l.pretrained={sd3_folder}/text_encoder"
        sd3 = configured(*SD3, where, "conditioner.parts.t5.pretrained=null")
    transformer = torch.nn.Module()
    pipe = StableDiffusion3Pipeline(**parts, vae=None, transformer=None, scheduler=None)
    if not t5:  # the pipeline asks the transformer for the width
        transformer.config = type("C", (), {"joint_attention_dim": 48})
        object.__setattr__(pipe, "transformer", transformer)
    context, null, pooled, null_pooled = pipe.encode_prompt(captions, None, None, device="cpu", max_sequence_length=32)
    assert_same(sd3({"caption": captions}), {"context": context, "pooled": pooled})
    assert_same(sd3.unconditional({"caption": captions}), {"context": null, "pooled": null_pooled})
    assert context.shape == (3, 20 + 32, 48)


def was_dropped(told, null, begin, end, tokens=slice(None)):
    return ((told - null)[:, tokens, begin:end].abs() < 1e-6).all(dim=(1, 2)) if told.ndim == 3 else None


def test_sdxl_drops_both_together_and_never_the_sizes(sdxl):
    for clip in (sdxl.parts["clip_l"], sdxl.parts["open_clip_bigg"]):
        clip.dropout = 0.4
    batch = {"caption": ["a big red star"] * NUM, "image_size": (64, 32)}
    told, null = sdxl(batch, Draw.of(0, NUM)), sdxl.unconditional(batch)
    first, second = (was_dropped(told["context"], null["context"], *columns) for columns in ((0, 16), (16, 40)))
    assert torch.equal(first, second)
    assert torch.equal(first, (told["pooled"] == 0).all(dim=1))
    assert 0.2 < first.float().mean() < 0.6
    assert (told["sizes"] == told["sizes"][:1]).all()


def test_sd3_drops_each_by_itself(sd3):
    batch = {"caption": ["a big red star"] * 4 * NUM}
    told, null = sd3(batch, Draw.of(0, 4 * NUM)), sd3.unconditional(batch)
    clip, t5 = slice(0, 20), slice(20, None)
    told, null = told["context"], null["context"]
    drops = [
        was_dropped(told, null, 0, 16, clip),
        was_dropped(told, null, 16, 40, clip),
        was_dropped(told, null, 0, 48, t5),
    ]
    for number, drop in enumerate(drops):
        assert float(drop.float().mean()) == pytest.approx(0.464, abs=0.1)
        other = drops[(number + 1) % 3]
        assert float((drop & other).float().mean()) == pytest.approx(0.464**2, abs=0.09)


def test_the_split_into_micro_batches_does_not_matter(sd3):
    captions, ids = ["a big red star", "two squares"] * 8, torch.arange(16)
    whole = sd3({"caption": captions}, Draw(0, ids, ids * 0))
    parts = [sd3({"caption": captions[i : i + 4]}, Draw(0, ids[i : i + 4], ids[:4] * 0)) for i in range(0, 16, 4)]
    assert_same({name: torch.cat([part[name] for part in parts]) for name in whole}, whole)


def test_masks_are_joined(sdxl_folder, sd3_folder, captions):
    clip = {"pretrained": f"{sdxl_folder}/text_encoder", "width": 16, "max_tokens": 20}
    t5 = {"pretrained": f"{sd3_folder}/text_encoder_3", "width": 48, "max_tokens": 32}
    lengths = [int(n) for n in T5(masked=True, **t5)({"caption": captions})["context_mask"].sum(1)]
    mixed = Composite({"clip": CLIP(**clip), "t5": T5(masked=True, **t5)}, 48, join="tokens")
    told = mixed({"caption": captions})
    assert told["context"].shape == (3, 52, 48)
    assert told["context_mask"].sum(1).tolist() == [20 + n for n in lengths]  # the first masks nothing
    assert told["context_mask"][:, :20].all()
    side = Composite({"a": CLIP(masked=True, **clip), "b": CLIP(masked=True, **clip)}, 32)({"caption": captions})
    assert torch.equal(side["context_mask"], CLIP(masked=True, **clip)({"caption": captions})["context_mask"])
    text_and_size = Composite({"clip": CLIP(masked=True, **clip), "size": Size()}, 16)
    told = text_and_size({"caption": captions, "image_size": (8, 8)})
    assert told.keys() == {"context", "context_mask", "sizes"}


def test_parts_that_learn_from_the_captions_each_have_their_tokenizer(tmp_path):
    small = {"width": 16, "num_layers": 1, "num_heads": 2, "max_tokens": 12}
    both = Composite({"a": Text(vocab_size=270, **small), "size": Size(), "b": Text(vocab_size=300, **small)}, 32)
    both.prepare(tmp_path, lambda: ["a big red star", "a small blue star"] * 9)
    told = both({"caption": ["a big red star"], "image_size": (8, 8)})
    assert told["context"].shape == (1, 12, 32)
    assert sorted(str(path.relative_to(tmp_path)) for path in tmp_path.glob("*/*")) == ["a/tokenizer", "b/tokenizer"]


def test_what_cannot_be_joined_is_refused(tmp_path):
    text = Text(width=16, num_heads=2)
    with pytest.raises(ConfigError, match="width is 20, but the parts text, size give 16 together"):
        Composite({"text": text, "size": Size()}, 20)
    with pytest.raises(ConfigError, match="pooled_width is 16, but the parts text give None together"):
        Composite({"text": text, "size": None}, 16, 16)
    labels = Composite({"a": Label(3), "b": Label(3)}, None)
    with pytest.raises(ConfigError, match="2 of the parts a, b give class_labels"):
        labels({"caption": [""], "attributes": [{"label": 1}]})


def test_concat_is_joined_along_the_channels():
    class Picture(torch.nn.Module):
        width = pooled_width = None

        inputs = {}

        def __init__(self, value):
            super().__init__()
            self.value = value

        def forward(self, batch, draw=None):
            return {"concat": torch.full((2, 3, 4, 4), self.value)}

    told = Composite({"a": Picture(1.0), "b": Picture(2.0)}, None)({"caption": ["", ""]})
    assert told["concat"][0, :, 0, 0].tolist() == [1, 1, 1, 2, 2, 2]
