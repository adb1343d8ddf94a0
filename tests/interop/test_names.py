"""Our tables against the converters of diffusers, which read single files of every Stable Diffusion."""

import pytest
import torch

from sdtrain.errors import ConfigError
from sdtrain.first_stage.autoencoder_kl import AutoencoderKL
from sdtrain.interop.names import from_open_clip, modern_vae_name, to_open_clip, unet_names, vae_names
from sdtrain.model.unet import UNet

SD1 = {"cross_attention_dim": 768}
SD2 = {"cross_attention_dim": 1024, "attention_head_dim": [5, 10, 20, 20], "use_linear_projection": True}
SDXL = {
    "cross_attention_dim": 2048,
    "block_out_channels": [320, 640, 1280],
    "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"],
    "up_block_types": ["CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"],
    "attention_head_dim": [5, 10, 20],
    "transformer_layers_per_block": [1, 2, 10],
    "use_linear_projection": True,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 256,
    "projection_class_embeddings_input_dim": 2816,
}
UPSCALER = SD2 | {"in_channels": 7, "num_class_embeds": 1000}
SMALL = {
    "block_out_channels": [32, 32],
    "down_block_types": ["CrossAttnDownBlock2D", "DownBlock2D"],
    "up_block_types": ["UpBlock2D", "CrossAttnUpBlock2D"],
    "layers_per_block": 1,
    "norm_num_groups": 8,
    "cross_attention_dim": 32,
}


@pytest.mark.parametrize(
    ("config", "num"), [(SD1, 686), (SD2, 686), (SDXL, 1680), (UPSCALER, 687), (SMALL, None)], ids=lambda value: ""
)
def test_unet(config, num):
    from diffusers.loaders.single_file_utils import convert_ldm_unet_checkpoint

    with torch.device("meta"):
        own = list(UNet(**config).state_dict())
    names = unet_names(own)
    assert len({*names.values()}) == len(own) == (num or len(own))
    # a converter moves whatever stands under a name: here our own name of it
    theirs = {f"model.diffusion_model.{old}": ours for ours, old in names.items()}
    found = convert_ldm_unet_checkpoint(theirs, {"layers_per_block": 2, "num_class_embeds": None} | config)
    assert found == {ours: ours for ours in own}


def test_names_that_everybody_knows():
    with torch.device("meta"):
        names = unet_names(UNet(**SD1).state_dict())
    assert names["conv_in.weight"] == "input_blocks.0.0.weight"
    assert names["down_blocks.0.downsamplers.0.conv.bias"] == "input_blocks.3.0.op.bias"
    assert names["mid_block.attentions.0.proj_in.weight"] == "middle_block.1.proj_in.weight"
    assert names["up_blocks.0.upsamplers.0.conv.weight"] == "output_blocks.2.1.conv.weight"
    assert names["up_blocks.1.upsamplers.0.conv.weight"] == "output_blocks.5.2.conv.weight"
    assert names["up_blocks.3.resnets.2.conv_shortcut.weight"] == "output_blocks.11.0.skip_connection.weight"
    with pytest.raises(ConfigError, match="a single file has no name for the parameter pos_embed.proj.weight"):
        unet_names(["pos_embed.proj.weight"])


@pytest.mark.parametrize("widths", [[8, 8, 16, 16], [8, 16]])
@pytest.mark.parametrize("attention", [True, False])
def test_vae(widths, attention):
    from diffusers.loaders.single_file_utils import convert_ldm_vae_checkpoint

    vae = AutoencoderKL(
        block_out_channels=widths, layers_per_block=2, norm_num_groups=4, mid_block_add_attention=attention
    )
    own = vae.state_dict()
    theirs = {}
    for ours, old in vae_names(own).items():
        is_projection = ".attn_1." in old and own[ours].dim() == 2
        theirs[f"first_stage_model.{old}"] = own[ours][:, :, None, None] if is_projection else own[ours]
    found = convert_ldm_vae_checkpoint(theirs, {"down_block_types": widths, "up_block_types": widths})
    assert found.keys() == own.keys()
    assert all(torch.equal(tensor, found[name]) for name, tensor in own.items())


def test_names_of_old_vae_folders():
    there = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}
    for old, new in there.items():
        for leaf in ("weight", "bias"):
            name = f"encoder.mid_block.attentions.0.{old}.{leaf}"
            assert modern_vae_name(name) == f"encoder.mid_block.attentions.0.{new}.{leaf}"
    for name in ("encoder.conv_in.weight", "decoder.mid_block.attentions.0.to_out.0.weight", "quant_conv.bias"):
        assert modern_vae_name(name) == name


def test_open_clip(clip_folders):
    from diffusers.loaders.single_file_utils import convert_open_clip_checkpoint
    from transformers import CLIPTextModelWithProjection

    encoder = CLIPTextModelWithProjection.from_pretrained(clip_folders / "text_encoder_2")
    own = encoder.state_dict()
    fused = to_open_clip(own)
    assert fused["transformer.resblocks.0.attn.in_proj_weight"].shape == (72, 24)
    assert {"positional_embedding", "token_embedding.weight", "ln_final.bias", "text_projection"} <= fused.keys()
    back = from_open_clip(fused | {"logit_scale": torch.ones(())})
    theirs = convert_open_clip_checkpoint(encoder, fused, prefix="")
    for found in (back, theirs):
        assert found.keys() == own.keys()
        assert all(torch.equal(tensor, found[name]) for name, tensor in own.items())
