"""The U-Net beside diffusers' UNet2DConditionModel: names, numbers and gradients, strictly loaded both ways."""

import inspect
from functools import cache

import pytest
import torch
from diffusers import UNet2DConditionModel
from torch.utils.flop_counter import FlopCounterMode

from sdtrain.build import build
from sdtrain.config import load_config
from sdtrain.model.unet import FIXED, UNet

SD1 = {  # as stable-diffusion-v1-5/unet/config.json, narrow
    "block_out_channels": [32, 32, 64, 64],
    "down_block_types": ["CrossAttnDownBlock2D"] * 3 + ["DownBlock2D"],
    "up_block_types": ["UpBlock2D"] + ["CrossAttnUpBlock2D"] * 3,
    "attention_head_dim": 8,
    "cross_attention_dim": 24,
    "norm_num_groups": 8,
}
SD2 = SD1 | {"attention_head_dim": [1, 2, 4, 4], "use_linear_projection": True, "upcast_attention": True}
SHORT = {  # attention at the lower of two levels, as configs/model/unet_tiny.yaml
    "block_out_channels": [16, 32],
    "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D"],
    "up_block_types": ["CrossAttnUpBlock2D", "UpBlock2D"],
    "layers_per_block": 1,
    "attention_head_dim": [2, 4],
    "cross_attention_dim": 24,
    "norm_num_groups": 8,
}
SDXL = {
    "block_out_channels": [16, 32, 32],
    "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"],
    "up_block_types": ["CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"],
    "transformer_layers_per_block": [1, 2, 3],
    "attention_head_dim": [1, 2, 4],
    "cross_attention_dim": 24,
    "norm_num_groups": 8,
    "use_linear_projection": True,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 8,
    "projection_class_embeddings_input_dim": 12 + 6 * 8,
}
UPSCALER = {
    "block_out_channels": [16, 16, 32, 32],
    "down_block_types": ["DownBlock2D"] + ["CrossAttnDownBlock2D"] * 3,
    "up_block_types": ["CrossAttnUpBlock2D"] * 3 + ["UpBlock2D"],
    "only_cross_attention": [True, True, True, False],
    "cross_attention_dim": 24,
    "norm_num_groups": 8,
    "num_class_embeds": 7,
    "use_linear_projection": True,
}


def drawn(seed, *shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


MASK = torch.tensor([[True] * 5, [True, True, False, False, True]])
SIZES = torch.tensor([[64.0, 48.0, 0.0, 3.0, 32.0, 32.0], [512.0, 768.0, 7.0, 0.0, 64.0, 32.0]])
CASES = {  # a config, and what is told beside the context
    "sd1": (SD1, {}),
    "sd2": (SD2, {}),
    "sdxl": (SDXL, {"pooled": drawn(3, 2, 12), "sizes": SIZES}),
    "upscaler": (UPSCALER | {"in_channels": 7}, {"class_labels": torch.tensor([6, 0]), "concat": drawn(4, 2, 3, 8, 8)}),
    "inpainting": (SHORT | {"in_channels": 9}, {"concat": drawn(4, 2, 5, 8, 8)}),
    "edit": (SHORT | {"in_channels": 8}, {"concat": drawn(4, 2, 4, 8, 8)}),
    "learned variance": (SHORT | {"out_channels": 8}, {}),
    "class table": (SHORT | {"num_class_embeds": 7}, {"class_labels": torch.tensor([6, 0])}),
    "class timestep": (SHORT | {"class_embed_type": "timestep"}, {"class_labels": torch.tensor([350, 20])}),
    "class identity": (SHORT | {"class_embed_type": "identity"}, {"class_labels": drawn(5, 2, 64)}),
    "class projection": (
        SHORT | {"class_embed_type": "projection", "projection_class_embeddings_input_dim": 12},
        {"pooled": drawn(3, 2, 12)},
    ),
    "mask": (SHORT, {"context_mask": MASK}),
    "odd sizes": (SD1, {}),
    "cross-attention only": (SHORT | {"only_cross_attention": True}, {}),
    "no middle": (SHORT | {"mid_block_type": None}, {}),
    "plain middle": (SHORT | {"mid_block_type": "UNetMidBlock2D"}, {}),
    "lists": (SHORT | {"layers_per_block": [2, 1], "transformer_layers_per_block": [3, 2]}, {}),
    "other sines": (SHORT | {"flip_sin_to_cos": False, "freq_shift": 1}, {}),
    "one level": (
        SHORT
        | {"block_out_channels": [32], "attention_head_dim": [4]}
        | {"down_block_types": ["CrossAttnDownBlock2D"], "up_block_types": ["CrossAttnUpBlock2D"]},
        {},
    ),
}


def twins(config, **ours_alone):
    """Ours and theirs with the same weights, loaded strictly each way."""
    torch.manual_seed(0)
    theirs = UNet2DConditionModel(**config)
    ours = UNet(**{k: v for k, v in config.items() if k != "upcast_attention"}, **ours_alone)
    ours.load_state_dict(theirs.state_dict())
    theirs.load_state_dict(ours.state_dict())
    return ours, theirs


def said(theirs, x, time, cond):
    """Their answer: they take class labels and pooled text by other names."""
    added = {"text_embeds": cond["pooled"], "time_ids": cond["sizes"]} if "sizes" in cond else None
    labels = None if added else cond.get("class_labels", cond.get("pooled"))
    x = torch.cat((x, cond["concat"]), 1) if "concat" in cond else x
    mask = cond.get("context_mask")
    return theirs(
        x, time, cond["context"], labels, encoder_attention_mask=mask, added_cond_kwargs=added
    ).sample  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_numbers_and_gradients_are_those_of_diffusers(case):
    config, more = CASES[case]
    ours, theirs = twins(config)
    size = (9, 13) if case == "odd sizes" else (8, 8)
    x, context = drawn(1, 2, 4, *size), drawn(2, 2, 5, 24)
    time, direction = torch.tensor([17.0, 803.5]), drawn(6, 2, ours.out_channels, *size)
    other = tuple(t.clone().requires_grad_() for t in (x, context))
    expected = said(theirs, other[0], time, {"context": other[1], **more})
    (expected * direction).sum().backward()
    named = dict(theirs.named_parameters())
    for ours.gradient_checkpointing in (False, True):
        mine = tuple(t.clone().requires_grad_() for t in (x, context))
        found = ours(mine[0], time, {"context": mine[1], **more})
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
        ours.zero_grad()
        (found * direction).sum().backward()
        for name, p in ours.named_parameters():
            reference = named[name].grad
            assert float((p.grad - reference).norm()) <= 1e-4 * float(reference.norm()) + 1e-6, name
        for a, b in zip(mine, other):
            assert float((a.grad - b.grad).norm()) <= 1e-4 * float(b.grad.norm())


# The content of published config.json files: what differs from the defaults.
SD15 = {"sample_size": 64, "cross_attention_dim": 768, "_diffusers_version": "0.6.0"}
SD21 = {
    "sample_size": 96,
    "cross_attention_dim": 1024,
    "attention_head_dim": [5, 10, 20, 20],
    "use_linear_projection": True,
    "upcast_attention": True,
}
PUBLISHED = {  # our config, theirs, the conditioner's width, parameters
    "SD 1.5": ("unet", SD15, 768, 859_520_964),
    "SD 1.5 inpainting": ("unet_inpaint", SD15 | {"in_channels": 9}, 768, 859_535_364),
    "InstructPix2Pix": ("unet_edit", SD15 | {"in_channels": 8}, 768, 859_532_484),
    "SD 2.1": ("unet_sd21", SD21, 1024, 865_910_724),
    "SD x4 upscaler": (
        "unet_upscale",
        {
            "sample_size": 128,
            "in_channels": 7,
            "block_out_channels": [256, 512, 512, 1024],
            "down_block_types": ["DownBlock2D"] + ["CrossAttnDownBlock2D"] * 3,
            "up_block_types": ["CrossAttnUpBlock2D"] * 3 + ["UpBlock2D"],
            "only_cross_attention": [True, True, True, False],
            "cross_attention_dim": 1024,
            "num_class_embeds": 1000,
            "use_linear_projection": True,
        },
        1024,
        473_398_020,
    ),
    "SDXL": (
        "unet_sdxl",
        {
            "sample_size": 128,
            "block_out_channels": [320, 640, 1280],
            "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"],
            "up_block_types": ["CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"],
            "transformer_layers_per_block": [1, 2, 10],
            "attention_head_dim": [5, 10, 20],
            "cross_attention_dim": 2048,
            "use_linear_projection": True,
            "upcast_attention": None,
            "addition_embed_type": "text_time",
            "addition_time_embed_dim": 256,
            "projection_class_embeddings_input_dim": 2816,
        },
        2048,
        2_567_463_684,
    ),
}


@cache
def configured(name, width):
    """The network of configs/model/NAME.yaml, without memory."""
    cfg = load_config([f"model={name}", f"conditioner.width={width}"])
    with torch.device("meta"):
        return build(cfg.model)


@pytest.mark.parametrize("name", PUBLISHED)
def test_at_full_size_names_and_shapes_are_the_published_ones(name):
    file, config, width, num_parameters = PUBLISHED[name]
    with torch.device("meta"):
        imported = UNet.from_diffusers(config | {"_class_name": "UNet2DConditionModel"})
        theirs = UNet2DConditionModel(**{key: value for key, value in config.items() if not key.startswith("_")})
    shapes = {name: tuple(p.shape) for name, p in theirs.state_dict().items()}
    for network in (configured(file, width), imported):
        assert {name: tuple(p.shape) for name, p in network.state_dict().items()} == shapes
    found = sum(p.numel() for p in imported.parameters())
    print(f"{name}: {found:,} parameters")
    assert found == num_parameters


# Multiply-accumulates of convolutions, linear layers and both attention products, 77 tokens, counted by hand.
COUNTED = [("unet", 768, 32, 90.1e9), ("unet", 768, 64, 401.6e9)]
COUNTED += [("unet_sd21", 1024, 32, 90.5e9), ("unet_sd21", 1024, 64, 402.1e9)]


@pytest.mark.parametrize(("file", "width", "size", "counted"), COUNTED)
def test_forward_flops_are_those_counted_by_hand(file, width, size, counted):
    network = configured(file, width)
    with torch.device("meta"), FlopCounterMode(display=False) as counter, torch.no_grad():
        network(torch.zeros(1, 4, size, size), torch.zeros(1), {"context": torch.zeros(1, 77, width)})
    print(f"{file} at {size}x{size}: {counter.get_total_flops() / 2e9:.1f} GMAC")
    assert abs(counter.get_total_flops() / 2 / counted - 1) < 0.01


def test_flops_are_the_same_on_a_cpu_where_attention_and_small_convolutions_are_plain_products():
    """Of lengths that need no filling up."""
    found = {}
    for device in ("meta", "cpu"):
        with torch.device(device):
            network, cond = UNet(**SHORT), {"context": torch.zeros(2, 32, 24)}
            x, time = torch.zeros(2, 4, 8, 16), torch.zeros(2)
        with FlopCounterMode(display=False) as counter, torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
            network(x, time, cond)
        found[device] = counter.get_flop_counts()["Global"]
    assert torch.ops.aten.baddbmm in found["cpu"]
    assert torch.ops.aten.convolution in found["cpu"]
    assert sum(found["cpu"].values()) == sum(found["meta"].values())


def test_defaults_are_those_of_diffusers():
    ours, theirs = (inspect.signature(kind).parameters for kind in (UNet, UNet2DConditionModel))
    assert ours.keys() - theirs.keys() == {"gradient_checkpointing"}
    defaults = {name: parameter.default for name, parameter in ours.items()} | FIXED
    for name in defaults.keys() & theirs.keys():
        assert defaults[name] == theirs[name].default, name
    assert theirs.keys() - defaults.keys() == {"sample_size", "upcast_attention"}  # taken at any value
