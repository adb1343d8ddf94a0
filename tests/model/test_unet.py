"""The U-Net beside diffusers' UNet2DConditionModel: the same names, the same numbers, the same gradients."""

import pytest
import torch
from diffusers import UNet2DConditionModel
from torch import nn

from sdtrain.build import build
from sdtrain.config import load_config
from sdtrain.errors import ConfigError
from sdtrain.model.unet import UNet

SD1 = {  # as stable-diffusion-v1-5/unet/config.json, narrow
    "block_out_channels": [32, 32, 64, 64],
    "down_block_types": ["CrossAttnDownBlock2D"] * 3 + ["DownBlock2D"],
    "up_block_types": ["UpBlock2D"] + ["CrossAttnUpBlock2D"] * 3,
    "attention_head_dim": 8,
    "cross_attention_dim": 24,
    "norm_num_groups": 8,
}
SD2 = SD1 | {"attention_head_dim": [1, 2, 4, 4], "use_linear_projection": True}
SHORT = {  # attention at the lower of two levels, as configs/model/unet_tiny.yaml
    "block_out_channels": [16, 32],
    "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D"],
    "up_block_types": ["CrossAttnUpBlock2D", "UpBlock2D"],
    "layers_per_block": 1,
    "attention_head_dim": [2, 4],
    "cross_attention_dim": 24,
    "norm_num_groups": 8,
}
CASES = {
    "sd1": (SD1, {}),
    "sd2": (SD2, {}),
    "two transformer layers": (SHORT | {"transformer_layers_per_block": 2}, {}),
    "class labels": (SHORT | {"num_class_embeds": 7}, {"class_labels": torch.tensor([6, 0])}),
    "pooled": (
        SHORT | {"class_embed_type": "projection", "projection_class_embeddings_input_dim": 12},
        {"pooled": torch.randn(2, 12, generator=torch.Generator().manual_seed(3))},
    ),
    "mask": (SHORT, {"context_mask": torch.tensor([[True] * 5, [True, True, False, False, True]])}),
    "concat": (
        SHORT | {"in_channels": 9},
        {"concat": torch.randn(2, 5, 16, 16, generator=torch.Generator().manual_seed(4))},
    ),
}


def twins(config):
    """Ours and theirs with the same weights, loaded strictly each way."""
    torch.manual_seed(0)
    theirs, ours = UNet2DConditionModel(**config), UNet(**config)
    ours.load_state_dict(theirs.state_dict())
    theirs.load_state_dict(ours.state_dict())
    return ours, theirs


def said(theirs, x, time, cond):
    labels = cond.get("class_labels", cond.get("pooled"))
    x = torch.cat((x, cond["concat"]), 1) if "concat" in cond else x
    return theirs(x, time, cond["context"], labels, encoder_attention_mask=cond.get("context_mask")).sample


@pytest.mark.parametrize("case", CASES)
def test_numbers_and_gradients_are_those_of_diffusers(case):
    config, more = CASES[case]
    ours, theirs = twins(config)
    generator = torch.Generator().manual_seed(1)
    x, direction = torch.randn(2, 2, 4, 16, 16, generator=generator)
    time, context = torch.tensor([17.0, 803.5]), torch.randn(2, 5, 24, generator=generator)
    mine, other = (tuple(t.clone().requires_grad_() for t in (x, context)) for _ in range(2))
    found = ours(mine[0], time, {"context": mine[1], **more})
    expected = said(theirs, other[0], time, {"context": other[1], **more})
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    (found * direction).sum().backward()
    (expected * direction).sum().backward()
    named = dict(theirs.named_parameters())
    for name, p in ours.named_parameters():
        reference = named[name].grad
        assert float((p.grad - reference).norm()) <= 1e-4 * float(reference.norm()) + 1e-6, name
    for a, b in zip(mine, other):
        assert float((a.grad - b.grad).norm()) <= 1e-4 * float(b.grad.norm())


def test_sizes_that_do_not_halve_evenly():
    ours, theirs = twins(SD1)
    x, context = torch.randn(1, 4, 9, 13), torch.randn(1, 5, 24)
    with torch.no_grad():
        found = ours(x, torch.tensor([5.0]), {"context": context})
        torch.testing.assert_close(found, theirs(x, 5, context).sample, rtol=1e-5, atol=1e-5)


def test_at_full_size_it_is_stable_diffusion_1_5():
    with torch.device("meta"):
        ours = UNet(cross_attention_dim=768)
        theirs = UNet2DConditionModel(sample_size=64, cross_attention_dim=768)
    shapes = {name: tuple(p.shape) for name, p in ours.state_dict().items()}
    assert shapes == {name: tuple(p.shape) for name, p in theirs.state_dict().items()}
    assert len(shapes) == 686
    assert sum(p.numel() for p in ours.parameters()) == 859_520_964


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
def test_every_convolution_meets_channels_last(config, dtype):
    network, met = UNet(**config), {}
    for name, module in network.named_modules():
        if isinstance(module, nn.Conv2d):
            assert module.weight.is_contiguous(memory_format=torch.channels_last)
            module.register_forward_hook(lambda m, xs, y, name=name: met.update({name: (xs[0], y)}))
    with torch.autocast("cpu", dtype, enabled=dtype == torch.bfloat16):
        y = network(torch.randn(2, 4, 16, 16), torch.tensor([1.0, 2.0]), {"context": torch.randn(2, 5, 24)})
    assert len(met) > 15
    for name, tensors in met.items():
        assert all(t.is_contiguous(memory_format=torch.channels_last) for t in tensors), name
    assert y.is_contiguous(memory_format=torch.channels_last)


def test_conditions_matter_and_samples_do_not_mix():
    ours, _ = twins(SHORT | {"num_class_embeds": 7})
    torch.manual_seed(1)
    x, time, context = torch.randn(2, 4, 8, 8), torch.tensor([3.0, 500.0]), torch.randn(2, 5, 24)
    cond = {"context": context, "class_labels": torch.tensor([1, 2])}
    with torch.no_grad():
        y = ours(x, time, cond)
        for changed in (
            ours(x, time + torch.tensor([0.0, 300.0]), cond),
            ours(x, time, cond | {"context": torch.cat((context[:1], context[1:] + 1))}),
            ours(x, time, cond | {"class_labels": torch.tensor([1, 5])}),
        ):
            torch.testing.assert_close(changed[0], y[0])
            assert float((changed[1] - y[1]).abs().mean()) > 1e-4


@pytest.mark.parametrize("key", ["pooled", "class_labels", "size"])
def test_a_condition_without_a_seat_is_refused(key):
    network = UNet(**SHORT)
    cond = {key: torch.zeros(1, dtype=torch.int64)} | ({} if key == "pooled" else {"context": torch.zeros(1, 5, 24)})
    with pytest.raises(ConfigError, match=f"no seat for the condition {key}; there are context, context_mask, concat"):
        network(torch.zeros(1, 4, 8, 8), torch.zeros(1), cond)


def test_a_pooled_context_needs_no_seat_beside_the_context_itself():
    network, cond = UNet(**SHORT), {"context": torch.zeros(1, 5, 24), "pooled": torch.zeros(1, 24)}
    assert network(torch.zeros(1, 4, 8, 8), torch.zeros(1), cond).shape == (1, 4, 8, 8)


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"down_block_types": ["DownBlock2D"]}, "2 block_out_channels need 2 down_block_types and .*, not 1 and 2"),
        ({"up_block_types": ["UpBlock2D"] * 3}, "2 block_out_channels need 2 down_block_types and .*, not 2 and 3"),
        ({"up_block_types": ["UpBlock2D", "AttnUpBlock2D"]}, "no block type 'AttnUpBlock2D'; there are CrossAttn"),
        ({"attention_head_dim": [8]}, "2 levels need 2 of attention_head_dim, not 1"),
        ({"class_embed_type": "projection"}, "needs projection_class_embeddings_input_dim"),
        ({"class_embed_type": "timestep"}, "class_embed_type is null or 'projection', not 'timestep'"),
    ],
)
def test_what_cannot_be_built_is_refused(change, told):
    with pytest.raises(ConfigError, match=told):
        UNet(**SHORT | change)


def test_without_a_text_encoder_it_attends_to_itself():
    cfg = load_config(["conditioner=none", "model=unet_tiny", "first_stage=autoencoder_kl_tiny"])
    network, conditioner = build(cfg.model), build(cfg.conditioner)
    nn.init.normal_(network.conv_out.weight)
    y = network(torch.randn(2, 4, 16, 16), torch.tensor([3.0, 4.0]), conditioner({"caption": ["a", "b"]}))
    assert y.shape == (2, 4, 16, 16)
    assert y.isfinite().all()
