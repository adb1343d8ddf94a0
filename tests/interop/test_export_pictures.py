"""A picture with a mask, a small one, one to edit and SDXL's sizes: the pipeline of diffusers draws what we draw."""

import diffusers
import pytest
import torch
from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution
from diffusers.pipelines.stable_diffusion import pipeline_stable_diffusion_upscale as upscale

from sdtrain.diffusion.guidance import ClassifierFree
from sdtrain.interop.export import write
from sdtrain.ops.random import Draw
from sdtrain.stage.generation import for_conditioner

PROMPT, NUM_STEPS, GUIDANCE = "a big red star on a white background", 4, 3.0
NOISE, SMALL = (torch.randn(1, n, 16, 16, generator=torch.Generator().manual_seed(n)) for n in (4, 3))
PICTURE = torch.rand(1, 3, 64, 64, generator=torch.Generator().manual_seed(1)) * 2 - 1


@torch.no_grad()
def draw(pipe, guidance, **told):
    """Our picture of PROMPT, (1, 3, H, W) in [0, 1]."""
    parts = pipe.generation
    batch = {"caption": [PROMPT], "sample_id": torch.zeros(1, dtype=torch.int64)} | told
    batch = for_conditioner(batch, parts.first_stage, parts.latent_size)
    cond, null = parts.conditioner(batch), parts.conditioner.unconditional(batch)
    denoise = guidance(parts.objective.x0_of(parts.model), cond, null)
    latent = parts.sampler(denoise, NOISE, parts.objective.path)
    return parts.first_stage.decode(parts.first_stage.unwhiten(latent)) / 2 + 0.5


@torch.no_grad()
def draw_theirs(folder, image=None, **told):
    """The picture of diffusers, before it is clipped, and the pipeline."""
    told |= {} if image is None else {"image": image / 2 + 0.5}
    pipeline = diffusers.DiffusionPipeline.from_pretrained(folder)
    pipeline.set_progress_bar_config(disable=True)
    given = {"prompt": PROMPT, "num_inference_steps": NUM_STEPS, "guidance_scale": GUIDANCE, "latents": NOISE.clone()}
    latent = pipeline(**given, output_type="latent", **told).images
    return pipeline.vae.decode(latent / pipeline.vae.config.scaling_factor).sample / 2 + 0.5, pipeline


def require_ours(theirs, ours):
    assert ours.std() > 0.05
    torch.testing.assert_close(theirs, ours, atol=1e-3, rtol=0)


@pytest.mark.parametrize("objective", ["v", "epsilon"])
def test_inpainting(loaded, tmp_path, monkeypatch, objective):
    pipe = loaded(f"objective={objective}", kind="inpainting")
    notes = write(pipe, None, tmp_path / "out")
    assert notes == ["it draws the masked picture's latents from their posterior, where this run takes their mean"]
    # The one thing that differs: it draws the masked picture's latents from their posterior, where we take its mean.
    monkeypatch.setattr(DiagonalGaussianDistribution, "sample", lambda self, generator=None: self.mode())
    mask = (torch.rand(1, 1, 64, 64, generator=torch.Generator().manual_seed(2)) > 0.5).float()
    ours = draw(pipe, ClassifierFree(GUIDANCE), image=PICTURE, mask=mask)
    theirs, pipeline = draw_theirs(tmp_path / "out", image=PICTURE, mask_image=mask)
    assert type(pipeline).__name__ == "StableDiffusionInpaintPipeline"
    require_ours(theirs, ours)
    assert (draw_theirs(tmp_path / "out", image=PICTURE, mask_image=1 - mask)[0] - ours).abs().max() > 1e-2
    assert (draw_theirs(tmp_path / "out", image=-PICTURE, mask_image=mask)[0] - ours).abs().max() > 1e-2


def test_upscaling(loaded, tmp_path, monkeypatch):
    pipe, small = loaded("objective=v", kind="upscaling"), SMALL.clamp(-1, 1)
    assert write(pipe, None, tmp_path / "out") == ["call the pipeline with noise_level=20 to draw as this run"]
    zero = torch.zeros(1, dtype=torch.int64)
    noise = Draw(0, zero, zero).normal("low_resolution", small.shape[1:])
    monkeypatch.setattr(upscale, "randn_tensor", lambda *given, **settings: noise)  # of another generator than ours
    ours = draw(pipe, ClassifierFree(GUIDANCE), image=small, noise_level=[50])
    theirs, pipeline = draw_theirs(tmp_path / "out", image=small, noise_level=50)
    assert type(pipeline).__name__ == "StableDiffusionUpscalePipeline"
    require_ours(theirs, ours)
    for image, level in ((small, 51), (-small, 50)):
        assert (draw_theirs(tmp_path / "out", image=image, noise_level=level)[0] - ours).abs().max() > 1e-2, level


def test_editing(loaded, tmp_path):
    pipe = loaded("objective=v", kind="editing")
    told = "call the pipeline with guidance_scale=5.0, image_guidance_scale=5.0 to draw as this run"
    assert write(pipe, None, tmp_path / "out") == [told]
    ours = draw(pipe, ClassifierFree(GUIDANCE, image_scale=1.5), source=PICTURE)
    theirs, pipeline = draw_theirs(tmp_path / "out", image=PICTURE, image_guidance_scale=1.5)
    assert type(pipeline).__name__ == "StableDiffusionInstructPix2PixPipeline"
    require_ours(theirs, ours)
    one_scale = draw(pipe, ClassifierFree(GUIDANCE), source=PICTURE)
    require_ours(draw_theirs(tmp_path / "out", image=PICTURE, image_guidance_scale=GUIDANCE)[0], one_scale)
    assert (one_scale - ours).abs().max() > 1e-2


def test_sizes(loaded, clip_folders, tmp_path):
    encoder = f"conditioner.parts.clip_l.pretrained={clip_folders}/text_encoder"
    pipe = loaded("objective=epsilon", encoder, kind="xl")
    write(pipe, None, tmp_path / "out")
    sizes = {"original_size": (100, 70), "crops_coords_top_left": (5, 9), "target_size": (64, 48)}
    told = dict(zip(("original_size", "crop_top_left", "target_size"), map(torch.tensor, sizes.values())))
    ours = draw(pipe, ClassifierFree(GUIDANCE), **{name: pair[None] for name, pair in told.items()})
    theirs, pipeline = draw_theirs(tmp_path / "out", **sizes)
    assert type(pipeline).__name__ == "StableDiffusionXLPipeline"
    require_ours(theirs, ours)
    require_ours(draw_theirs(tmp_path / "out")[0], draw(pipe, ClassifierFree(GUIDANCE)))
    for name, (first, second) in sizes.items():
        swapped = sizes | {name: (second, first)}
        assert (draw_theirs(tmp_path / "out", **swapped)[0] - ours).abs().max() > 1e-2, name


def test_an_editor_that_always_saw_its_picture(loaded, tmp_path):
    pipe = loaded("objective=v", "conditioner.parts.image.dropout=0", kind="editing")
    told = "call the pipeline with guidance_scale=5.0, image_guidance_scale=1.0 to draw as this run"
    assert write(pipe, None, tmp_path / "out") == [told]
    theirs = draw_theirs(tmp_path / "out", image=PICTURE, image_guidance_scale=1.0)[0]
    require_ours(theirs, draw(pipe, ClassifierFree(GUIDANCE), source=PICTURE))
