"""The U-Net on its own; beside diffusers it stands in tests/contract/test_unet_diffusers.py."""

import pytest
import torch
from torch import nn

from sdtrain.build import build
from sdtrain.config import load_config
from sdtrain.errors import ConfigError
from sdtrain.layer.attention import SpatialTransformer
from sdtrain.layer.conv import Conv1x1
from sdtrain.layer.resnet import ResnetBlock
from sdtrain.model.unet import FIXED, UNet

SHORT = {  # attention at the lower of two levels, as configs/model/unet_tiny.yaml
    "block_out_channels": [16, 32],
    "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D"],
    "up_block_types": ["CrossAttnUpBlock2D", "UpBlock2D"],
    "layers_per_block": 1,
    "attention_head_dim": [2, 4],
    "cross_attention_dim": 24,
    "norm_num_groups": 8,
}
SDXL = {"addition_embed_type": "text_time", "addition_time_embed_dim": 8, "projection_class_embeddings_input_dim": 60}


def learned(**config):
    """A network that no longer answers zero."""
    torch.manual_seed(0)
    network = UNet(**SHORT | config)
    for module in network.modules():
        if isinstance(module, nn.Conv2d | nn.Linear):
            module.reset_parameters()
    return network


def test_at_first_it_predicts_zero_and_can_learn():
    torch.manual_seed(0)
    network = UNet(**SHORT)
    x = torch.randn(2, 4, 16, 16)
    y = network(x, torch.tensor([1.0, 900.0]), {"context": torch.randn(2, 5, 24)})
    assert y.shape == x.shape
    assert not y.any()
    (y - 1).square().sum().backward()
    assert float(network.conv_out.weight.grad.norm()) > 0
    x = torch.randn(2, 32, 8, 8)
    for resnet in network.mid_block.resnets:  # its residual blocks begin as the identity
        assert torch.equal(resnet(x, torch.randn(2, 64)), x)


@pytest.mark.parametrize("config", [SHORT, SHORT | {"use_linear_projection": True}], ids=["conv", "linear"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_every_block_and_convolution_meets_channels_last(config, dtype):
    network, met = UNet(**config), {}
    for name, module in network.named_modules():
        if isinstance(module, nn.Conv2d):
            assert module.weight.is_contiguous(memory_format=torch.channels_last)
        if isinstance(module, nn.Conv2d | ResnetBlock | SpatialTransformer) and not isinstance(module, Conv1x1):
            module.register_forward_hook(lambda m, xs, y, name=name: met.update({name: (xs[0], y)}))
    with torch.autocast("cpu", dtype, enabled=dtype == torch.bfloat16):
        y = network(torch.randn(2, 4, 16, 16), torch.tensor([1.0, 2.0]), {"context": torch.randn(2, 5, 24)})
    assert len(met) > 25
    for name, tensors in met.items():
        assert all(t.is_contiguous(memory_format=torch.channels_last) for t in tensors), name
    assert y.is_contiguous(memory_format=torch.channels_last)


def test_conditions_matter_and_samples_do_not_mix():
    ours = learned(num_class_embeds=7, **SDXL)
    torch.manual_seed(1)
    x, time = torch.randn(2, 4, 8, 8), torch.tensor([3.0, 500.0])
    cond = {
        "context": torch.randn(2, 5, 24),
        "class_labels": torch.tensor([1, 2]),
        "pooled": torch.randn(2, 12),
        "sizes": torch.full((2, 6), 64.0),
    }
    later = torch.tensor([0.0, 1.0])
    with torch.no_grad():
        y = ours(x, time, cond)
        for changed in (
            ours(x, time + 300 * later, cond),
            ours(x, time, cond | {"context": cond["context"] + later[:, None, None]}),
            ours(x, time, cond | {"class_labels": torch.tensor([1, 5])}),
            ours(x, time, cond | {"pooled": cond["pooled"] + later[:, None]}),
            ours(x, time, cond | {"sizes": cond["sizes"] + torch.tensor([0, 0, 0, 0, 0, 32.0]) * later[:, None]}),
        ):
            torch.testing.assert_close(changed[0], y[0])
            assert float((changed[1] - y[1]).abs().mean()) > 1e-4


@pytest.mark.parametrize("key", ["pooled", "class_labels", "size"])
def test_a_condition_without_a_seat_is_refused(key):
    cond = {key: torch.zeros(1, dtype=torch.int64)} | ({} if key == "pooled" else {"context": torch.zeros(1, 5, 24)})
    with pytest.raises(ConfigError, match=f"no seat for the condition {key}; there are context, context_mask, concat"):
        UNet(**SHORT)(torch.zeros(1, 4, 8, 8), torch.zeros(1), cond)


@pytest.mark.parametrize(
    ("config", "told", "missing"),
    [
        ({}, {}, "context"),
        ({"num_class_embeds": 7}, {"context": 24}, "class_labels"),
        (SDXL, {"context": 24}, "pooled, sizes"),
        (SDXL | {"class_embed_type": "projection"}, {"context": 24, "sizes": 6}, "pooled"),
    ],
)
def test_a_condition_that_is_needed_and_not_told_is_asked_for(config, told, missing):
    cond = {key: torch.zeros(1, 5, width) for key, width in told.items()}
    with pytest.raises(ConfigError, match=f"it needs the condition {missing} and is told"):
        UNet(**SHORT | config)(torch.zeros(1, 4, 8, 8), torch.zeros(1), cond)


@pytest.mark.parametrize("joined", [{}, {"concat": torch.zeros(1, 4, 8, 8)}])
def test_channels_that_do_not_add_up_are_refused(joined):
    with pytest.raises(ConfigError, match=f"in_channels is 9, but x_t with what joins it has {8 if joined else 4}"):
        UNet(**SHORT | {"in_channels": 9})(
            torch.zeros(1, 4, 8, 8), torch.zeros(1), {"context": torch.zeros(1, 5, 24), **joined}
        )


def test_a_pooled_context_needs_no_seat_beside_the_context_itself():
    network, cond = UNet(**SHORT), {"context": torch.zeros(1, 5, 24), "pooled": torch.zeros(1, 24)}
    assert network(torch.zeros(1, 4, 8, 8), torch.zeros(1), cond).shape == (1, 4, 8, 8)


@pytest.mark.parametrize("only", [False, True])
def test_a_masked_token_changes_nothing(only):
    ours = learned(only_cross_attention=only)
    x, time, context = torch.randn(1, 4, 8, 8), torch.tensor([3.0]), torch.randn(1, 3, 24)
    mask = torch.tensor([[True, False, True]])
    other = torch.where(mask[..., None], context, torch.randn(1, 3, 24))
    with torch.no_grad():
        y = ours(x, time, {"context": context, "context_mask": mask})
        assert torch.equal(ours(x, time, {"context": other, "context_mask": mask}), y)
        assert not torch.allclose(ours(x, time, {"context": context}), y)


@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_checkpointing_keeps_less_and_gives_the_same(dropout):
    network, kept, gradients = learned(dropout=dropout), [], []
    x, time, cond = torch.randn(2, 4, 16, 16), torch.tensor([3.0, 500.0]), {"context": torch.randn(2, 5, 24)}

    def keep(tensor):
        kept[-1] += tensor.numel()
        return tensor

    for network.gradient_checkpointing in (False, True):
        kept.append(0)
        torch.manual_seed(2)
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            y = network(x, time, cond)
        num_kept = kept[-1]
        gradients.append([y, *torch.autograd.grad(y.square().sum(), list(network.parameters()))])
        kept[-1] = num_kept
    assert kept[1] < 0.4 * kept[0], kept
    for a, b in zip(*gradients):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"down_block_types": ["DownBlock2D"]}, "2 block_out_channels need 2 of down_block_types, not 1"),
        ({"up_block_types": ["UpBlock2D"] * 3}, "2 block_out_channels need 2 of up_block_types, not 3"),
        ({"up_block_types": ["UpBlock2D", "DownBlock2D"]}, "an up_block_type is one of CrossAttnUpBlock2D, UpBlock2D"),
        ({"down_block_types": ["DownBlock2D", "AttnDownBlock2D"]}, "a down_block_type is .*, not 'AttnDownBlock2D'"),
        ({"mid_block_type": "MidBlock"}, "UNetMidBlock2DCrossAttn, UNetMidBlock2D, null, not 'MidBlock'"),
        ({"attention_head_dim": [8]}, "2 block_out_channels need 2 of attention_head_dim, not 1"),
        ({"layers_per_block": [1, 1, 1]}, "2 block_out_channels need 2 of layers_per_block, not 3"),
        ({"transformer_layers_per_block": [1]}, "need 2 of transformer_layers_per_block, not 1"),
        ({"only_cross_attention": [True]}, "need 2 of only_cross_attention, not 1"),
        ({"class_embed_type": "projection"}, "needs projection_class_embeddings_input_dim"),
        ({"class_embed_type": "simple_projection"}, "timestep, identity, projection, null, not 'simple_projection'"),
        ({"addition_embed_type": "text"}, "addition_embed_type is one of text_time, null, not 'text'"),
        ({"addition_embed_type": "text_time"}, "text_time needs projection_class_embeddings_input_dim and addition_"),
    ],
)
def test_what_cannot_be_built_is_refused(change, told):
    with pytest.raises(ConfigError, match=told):
        UNet(**SHORT | change)


@pytest.mark.parametrize("key", FIXED)
def test_a_key_of_diffusers_without_a_meaning_is_taken_at_its_default_alone(key):
    config = SHORT | {"_class_name": "UNet2DConditionModel", "_diffusers_version": "0.42.1", "sample_size": 64}
    with torch.device("meta"):
        UNet.from_diffusers(config | {key: FIXED[key]})
    with pytest.raises(ConfigError, match=f"model: {key} is 'another' there; only {FIXED[key]!r} is built here"):
        UNet.from_diffusers(config | {key: "another"})


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"norm_group": 8}, "unknown key 'norm_group'; did you mean 'norm_num_groups'"),
        ({"gradient_checkpointing": True}, "unknown key 'gradient_checkpointing'"),
        ({"_class_name": "UNet2DModel"}, "the config is of a UNet2DModel, not of a UNet2DConditionModel"),
        ({"cross_attention_dim": [24, 32]}, r"cross_attention_dim is \[24, 32\] there; only one for all"),
    ],
)
def test_another_config_is_refused_by_name(change, told):
    with pytest.raises(ConfigError, match=told):
        UNet.from_diffusers(SHORT | change)


def test_a_width_of_the_context_for_every_level_is_one_for_all():
    assert UNet.from_diffusers(SHORT | {"cross_attention_dim": [24, 24]}).needs == ("context",)


def test_without_a_text_encoder_it_attends_to_itself():
    cfg = load_config(["conditioner=none", "model=unet_tiny", "first_stage=autoencoder_kl_tiny"])
    network, conditioner = build(cfg.model), build(cfg.conditioner)
    nn.init.normal_(network.conv_out.weight)
    y = network(torch.randn(2, 4, 16, 16), torch.tensor([3.0, 4.0]), conditioner({"caption": ["a", "b"]}))
    assert y.shape == (2, 4, 16, 16)
    assert y.isfinite().all()
    assert network.seats == ("concat",)
