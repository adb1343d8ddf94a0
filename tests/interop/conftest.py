"""Runs of every kind with random weights and nothing trained: what an export reads is there, in a second."""

from pathlib import Path

import pytest
import torch

CAPTIONS = ["a big red star on a white background", "a small blue ring", "two green hearts"] * 4
RUN = (
    "+experiment=smoke tracker=none precision=32-true sampler=ddim sampler.spacing=trailing sampler.num_steps=4".split()
)
VAE = "first_stage.block_out_channels=[8,8,8] first_stage.norm_num_groups=4".split()
UNET = """
model.block_out_channels=[32,32] model.norm_num_groups=8 model.attention_head_dim=[1,2]
model.class_embed_type=null model.projection_class_embeddings_input_dim=null
""".split()
TEXT = "conditioner.width=32 conditioner.num_heads=1 conditioner.num_layers=2 conditioner.vocab_size=300".split()
PLAIN = """
conditioner=none model.down_block_types=[DownBlock2D,DownBlock2D] model.up_block_types=[UpBlock2D,UpBlock2D]
+model.mid_block_type=null
""".split()
PARTS = [line.replace("conditioner.", "conditioner.parts.text.") for line in TEXT]
XL = """
conditioner=sdxl conditioner.width=40 conditioner.pooled_width=24 conditioner.parts.clip_l.width=16
conditioner.parts.open_clip_bigg.width=24 conditioner.parts.open_clip_bigg.pooled_width=24
+conditioner.parts.clip_l.max_tokens=16 +conditioner.parts.open_clip_bigg.max_tokens=16
+model.addition_embed_type=text_time +model.addition_time_embed_dim=8
model.projection_class_embeddings_input_dim=72 +model.transformer_layers_per_block=[1,2]
""".split()
MMDIT = """
objective=rectified_flow sampler=flow_euler sampler.spacing=linspace
model=mmdit_tiny model.num_layers=2 model.attention_head_dim=8 model.num_attention_heads=2
model.caption_projection_dim=16 model.joint_attention_dim=48 model.pooled_projection_dim=40
conditioner=sd3 conditioner.width=48 conditioner.pooled_width=40
conditioner.parts.clip.width=40 conditioner.parts.clip.pooled_width=40
conditioner.parts.clip.parts.clip_l.width=16 conditioner.parts.clip.parts.clip_l.pooled_width=16
conditioner.parts.clip.parts.open_clip_bigg.width=24 conditioner.parts.clip.parts.open_clip_bigg.pooled_width=24
+conditioner.parts.clip.parts.clip_l.max_tokens=16 +conditioner.parts.clip.parts.open_clip_bigg.max_tokens=16
conditioner.parts.t5.width=48
""".split()
KINDS = {
    "text": [*VAE, *UNET, *TEXT],
    "codebook": ["first_stage=vq_tiny", *UNET, *TEXT],
    "pixels": ["first_stage=identity", *UNET, *TEXT],
    "concat": ["conditioner=text_concat", "model.in_channels=68", *VAE, *UNET],
    "none": ["conditioner=none", *VAE, *UNET],
    "xl": [*VAE, *UNET, *XL],
    "inpainting": ["conditioner=inpainting", "model.in_channels=9", *VAE, *UNET, *PARTS],
    "editing": ["conditioner=editing", "model.in_channels=8", *VAE, *UNET, *PARTS],
    "upscaling": ["conditioner=upscaling", "model.in_channels=7", "+model.num_class_embeds=1000", *VAE, *UNET, *PARTS],
    "ldm": [*VAE, *UNET, *PLAIN],
    "ldm_codebook": ["first_stage=vq_tiny", *UNET, *PLAIN],
    "mmdit": [*VAE, *MMDIT],
}


def randomise(module, seed=0):
    """No parameter keeps a value that hides what it does: many begin as zero."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            scale = 0.02 if parameter.dim() == 1 else (parameter[0].numel()) ** -0.5
            parameter.add_(torch.randn(parameter.shape, generator=generator) * scale)
    return module


@pytest.fixture(scope="session")
def loaded(tmp_path_factory):
    """loaded(*overrides, kind, seed) -> a Pipeline, as `Pipeline.load` gives that of a run of this config."""

    def load(*overrides, kind="text", seed=0):
        from sdtrain.build import build
        from sdtrain.config import load_config
        from sdtrain.interop.pipeline import Pipeline
        from sdtrain.stage.generation import Generation

        cfg = load_config([*RUN, *KINDS[kind], *overrides])
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            model, conditioner, first_stage = (build(cfg[name]) for name in ("model", "conditioner", "first_stage"))
        if hasattr(conditioner, "prepare"):
            conditioner.prepare(tmp_path_factory.mktemp("tokenizer"), lambda: CAPTIONS)
        channels = first_stage.latent_channels
        if hasattr(first_stage, "scales_channels"):
            whole = first_stage.shifts_channels
            first_stage.shift = [0.3 - 0.2 * i * whole for i in range(channels)]
            first_stage.scale = [0.8 + 0.3 * i * first_stage.scales_channels for i in range(channels)]
        for number, module in enumerate((model, conditioner, first_stage)):
            randomise(module, seed + number).eval().requires_grad_(False)
        parts = (model, conditioner, build(cfg.objective), first_stage, build(cfg.sampler))
        return Pipeline(cfg, Generation(*parts, latent_size=(16, 16)))

    return load


@pytest.fixture(scope="session")
def clip_folders(tmp_path_factory):
    """Two CLIP text models with projections and a T5 encoder, as a Stable Diffusion 3 folder holds them."""
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, T5Config, T5EncoderModel

    from sdtrain.conditioner.tokenizer import LEARNED_IDS, train_tokenizer

    folder = tmp_path_factory.mktemp("encoders")
    tokenizer = train_tokenizer(CAPTIONS, 300)
    tokens = {"vocab_size": len(tokenizer), **LEARNED_IDS}
    wide = {"num_hidden_layers": 3, "num_attention_heads": 2, "max_position_embeddings": 16}
    for name, kind, width in (
        ("text_encoder", CLIPTextModelWithProjection, 16),
        ("text_encoder_2", CLIPTextModelWithProjection, 24),
        ("plain", CLIPTextModel, 16),
    ):
        config = CLIPTextConfig(
            hidden_size=width,
            intermediate_size=32,
            projection_dim=width,
            hidden_act="gelu" if width == 24 else "quick_gelu",
            **tokens,
            **wide,
        )
        randomise(kind(config), width).save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
    config = T5Config(d_model=48, d_kv=8, d_ff=32, num_layers=1, num_heads=2, vocab_size=len(tokenizer))
    randomise(T5EncoderModel(config)).save_pretrained(folder / "text_encoder_3")
    tokenizer.save_pretrained(folder / "text_encoder_3")
    return Path(folder)
