"""Pictures as conditions: masked, small, or to edit; in the order and at the size that pipelines take them."""

import pytest
import torch
from diffusers import DDPMScheduler

from sdtrain.build import build
from sdtrain.conditioner.image import LowResolution, MaskedImage, SourceImage
from sdtrain.config import load_config
from sdtrain.diffusion.path import RectifiedFlow, VariancePreserving
from sdtrain.errors import ConfigError
from sdtrain.ops.random import Draw

PATH = VariancePreserving("scaled_linear", beta_start=1e-4, beta_end=0.02)


@pytest.fixture
def batch():
    generator = torch.Generator().manual_seed(0)
    return {
        "caption": ["a", "b"],
        "image": torch.rand(2, 3, 32, 16, generator=generator) * 2 - 1,
        "sample_id": torch.tensor([4, 7]),
        "image_size": (32, 16),
        "latent_size": (8, 4),
        "encode": lambda image: torch.nn.functional.avg_pool2d(image, 4)[:, [0, 1, 2, 0]],
    }


def test_a_given_mask_and_then_the_masked_pictures_latents(batch):
    mask = torch.zeros(2, 1, 32, 16)
    mask[0, :, :16] = 1
    told = MaskedImage()(batch | {"mask": mask})["concat"]
    assert told.shape == (2, 5, 8, 4)
    assert told[0, 0, :4].all()
    assert not told[0, 0, 4:].any()
    assert not told[0, 1:, :4].any()  # nothing of what is to be painted is told
    torch.testing.assert_close(told[:, 1:], batch["encode"](batch["image"] * (mask < 0.5)))
    torch.testing.assert_close(told[1, 1:], batch["encode"](batch["image"])[1])


def test_a_sample_without_a_mask_draws_its_own(batch):
    mask = torch.full((2, 1, 32, 16), -1.0)
    mask[0] = 1
    drawn, told = MaskedImage()(batch)["concat"], MaskedImage()(batch | {"mask": mask})["concat"]
    assert told[0, 0].all()
    assert not drawn[0, 0].all()
    assert torch.equal(told[1], drawn[1])


def test_masks_are_drawn_by_sample(batch):
    draw = Draw(0, batch["sample_id"], batch["sample_id"] * 0)
    told = MaskedImage()(batch, draw)["concat"]
    assert set(told[:, 0].unique().tolist()) <= {0, 1}
    later = Draw(0, batch["sample_id"], batch["sample_id"] * 0 + 1)
    assert not torch.equal(MaskedImage()(batch, later)["concat"], told)
    one = {name: value[1:] if isinstance(value, torch.Tensor) else value for name, value in batch.items()}
    assert torch.equal(MaskedImage()(one, Draw(0, draw.sample_id[1:], draw.epoch[1:]))["concat"], told[1:])


def test_without_a_draw_the_mask_is_the_samples_own_and_null_the_same(batch):
    told = MaskedImage()(batch)["concat"]
    assert torch.equal(
        MaskedImage()(batch | {"sample_id": batch["sample_id"].flip(0)})["concat"][:, 0], told.flip(0)[:, 0]
    )
    assert torch.equal(MaskedImage().unconditional(batch)["concat"], told)


def test_a_small_picture_with_the_upscalers_noise(batch):
    upscaling = LowResolution(PATH)
    small = torch.rand(2, 3, 8, 4) * 2 - 1
    batch = batch | {"image": small}
    draw = Draw(0, torch.arange(2), torch.zeros(2, dtype=torch.int64))
    told = upscaling(batch, draw)
    scheduler = DDPMScheduler(beta_start=1e-4, beta_end=0.02, beta_schedule="scaled_linear")
    noise = draw.normal("low_resolution", (3, 8, 4))
    expected = scheduler.add_noise(small, noise, told["class_labels"])
    torch.testing.assert_close(told["concat"], expected, rtol=0, atol=1e-5)
    plain = upscaling(batch)
    assert plain["class_labels"].tolist() == [20, 20]
    assert torch.equal(upscaling(batch)["concat"], plain["concat"])
    assert torch.equal(upscaling.unconditional(batch)["concat"], plain["concat"])


def test_noise_levels_below_the_greatest(batch):
    draw = Draw.of(0, 3000)
    level = LowResolution(PATH)({"image": torch.zeros(3000, 3, 2, 2), "latent_size": (2, 2)}, draw)["class_labels"]
    assert (int(level.min()), int(level.max())) == (0, 349)
    assert level.dtype == torch.int64
    assert abs(float(level.float().mean()) - 174.5) < 6


def test_the_noise_level_that_is_asked_for(batch):
    batch = batch | {"image": torch.zeros(2, 3, 8, 4)}
    told = LowResolution(PATH)(batch | {"noise_level": [0, 349]})
    assert told["class_labels"].tolist() == [0, 349]
    spread = told["concat"].flatten(1).std(dim=1)
    assert float(spread[1] / spread[0]) > 10
    for wrong in (350, -1, "20"):
        with pytest.raises(ConfigError, match=f"noise_level={wrong!r} must be a whole number from 0 to 349"):
            LowResolution(PATH)(batch | {"noise_level": [0, wrong]})


@pytest.mark.parametrize(
    ("wrong", "expected"),
    [
        ({"max_noise_level": 10}, "noise_level=20 must be a whole number from 0 to 9"),
        ({"max_noise_level": 1001}, "max_noise_level=1001 must be 1 to 1000"),
        ({"path": RectifiedFlow()}, "must be VariancePreserving, not RectifiedFlow"),
    ],
)
def test_levels_that_were_never_trained_are_refused(wrong, expected):
    with pytest.raises(ConfigError, match=expected):
        LowResolution(**{"path": PATH} | wrong)


def test_a_picture_is_made_small(batch):
    batch["image"] = torch.linspace(-1, 1, 32)[:, None].expand(2, 3, 32, 16)
    told = LowResolution(PATH, noise_level=0)(batch)["concat"]
    small = torch.nn.functional.avg_pool2d(batch["image"], 4)
    assert told.shape == small.shape
    assert (told - small).abs().mean() < 0.03  # and a little noise


def test_the_picture_to_edit(batch):
    batch = batch | {"source": batch["image"].flip(0)}
    told = SourceImage(dropout=0.0)
    torch.testing.assert_close(told(batch)["concat"], batch["encode"](batch["source"]))
    torch.testing.assert_close(told.unconditional(batch)["concat"], batch["encode"](batch["source"]))
    assert not SourceImage(dropout=0.1).unconditional(batch)["concat"].any()
    many = {"source": torch.ones(2000, 3, 4, 4), "encode": lambda image: image[:, :1]}
    gone = ~SourceImage(dropout=0.2)(many, Draw.of(0, 2000))["concat"].flatten(1).any(1)
    assert float(gone.float().mean()) == pytest.approx(0.2, abs=0.04)


def test_a_batch_without_the_picture_says_what_to_do(batch):
    del batch["image"]
    with pytest.raises(ConfigError, match="the batch has no 'image'$"):
        MaskedImage()(batch)
    with pytest.raises(ConfigError, match="the batch has no 'image'; set diffusion.cache_latents=false"):
        LowResolution(PATH)(batch | {"latent": torch.zeros(2, 2, 4, 8, 4)})
    with pytest.raises(ConfigError, match="the batch has no 'source'"):
        SourceImage()(batch)


@pytest.mark.parametrize(
    ("name", "channels", "keys"),
    [
        ("inpainting", 5, {"context", "pooled", "concat"}),
        ("upscaling", 3, {"context", "pooled", "concat", "class_labels"}),
        ("editing", 4, {"context", "pooled", "concat"}),
    ],
)
def test_beside_text_as_configured(batch, name, channels, keys, tmp_path):
    small = ["width=16", "num_layers=1", "num_heads=2", "vocab_size=270", "max_tokens=8"]
    net = ["model=unet_upscale"] if name == "upscaling" else []  # which has the classes that it names
    conditioner = build(
        load_config([*net, f"conditioner={name}", *(f"conditioner.parts.text.{o}" for o in small)]).conditioner
    )
    conditioner.prepare(tmp_path, lambda: ["a star", "a square"])
    batch = batch | {"source": batch["image"]}
    told, null = conditioner(batch, Draw.of(0, 2)), conditioner.unconditional(batch)
    assert told.keys() == null.keys() == keys
    assert told["concat"].shape == null["concat"].shape == (2, channels, 8, 4)
