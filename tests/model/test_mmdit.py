"""The MMDiT: what it starts as, what it is told, and what it refuses."""

import pytest
import torch
from torch.nn import functional as F

from sdtrain.build import build
from sdtrain.config import load_config
from sdtrain.errors import ConfigError
from sdtrain.layer.joint import JointBlock, RMSNorm
from sdtrain.model.mmdit import MMDiT

SMALL = {
    "sample_size": 8,
    "in_channels": 4,
    "num_layers": 3,
    "attention_head_dim": 16,
    "num_attention_heads": 2,
    "joint_attention_dim": 24,
    "caption_projection_dim": 32,
    "pooled_projection_dim": 10,
    "out_channels": 4,
    "pos_embed_max_size": 6,
    "dual_attention_layers": [0],
    "qk_norm": "rms_norm",
}


def trained(**change):
    """As if trained: with no weight at zero."""
    torch.manual_seed(0)
    network = MMDiT(**SMALL | change)
    with torch.no_grad():
        for p in network.parameters():
            p.add_(torch.randn_like(p) * 0.1)
    return network


def told(batch=2):
    generator = torch.Generator().manual_seed(1)
    x, context = torch.randn(batch, 4, 8, 8, generator=generator), torch.randn(batch, 5, 24, generator=generator)
    cond = {"context": context, "pooled": torch.randn(batch, 10, generator=generator)}
    return x, torch.tensor([3.0, 500.0])[:batch], cond


def test_at_first_it_predicts_zero_and_each_block_is_the_identity():
    torch.manual_seed(0)
    network = MMDiT(**SMALL)
    x, time, cond = told()
    y = network(x, time, cond)
    assert y.shape == x.shape
    assert not y.any()
    tokens, text, temb = torch.randn(2, 16, 32), torch.randn(2, 5, 32), torch.randn(2, 32)
    for block in network.transformer_blocks:
        after = block(tokens, text, temb, None)
        assert torch.equal(after[0], tokens)
        assert torch.equal(after[1], text)


def test_it_learns_from_there():
    torch.manual_seed(0)
    network = MMDiT(**SMALL)
    x, time, cond = told()
    optimizer = torch.optim.AdamW(network.parameters(), 5e-3)
    losses = []
    for _ in range(20):
        loss = (network(x, time, cond) - x.flip(3)).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0]
    assert all(p.grad is not None for p in network.parameters())  # or DistributedDataParallel waits for it


def test_masked_words_change_nothing():
    network = trained()
    x, time, cond = told()
    mask = torch.tensor([[True, True, False, False, False], [True, True, True, True, False]])
    other = cond["context"].masked_fill(~mask[:, :, None], 9.0)
    with torch.no_grad():
        y = network(x, time, cond | {"context_mask": mask})
        assert torch.equal(network(x, time, cond | {"context": other, "context_mask": mask}), y)
        short = {"context": cond["context"][:1, :2], "pooled": cond["pooled"][:1]}
        torch.testing.assert_close(network(x[:1], time[:1], short), y[:1])  # as if they were not there
        assert float((network(x, time, cond) - y).abs().mean()) > 1e-4
        none = cond | {"context_mask": torch.zeros_like(mask)}
        assert network(x, time, none).isfinite().all()


def test_conditions_matter_and_samples_do_not_mix():
    network = trained()
    x, time, cond = told()
    with torch.no_grad():
        y = network(x, time, cond)
        for changed in (
            network(x, time + torch.tensor([0.0, 300.0]), cond),
            network(x, time, cond | {"context": torch.cat((cond["context"][:1], cond["context"][1:] + 1))}),
            network(x, time, cond | {"pooled": torch.cat((cond["pooled"][:1], cond["pooled"][1:] + 1))}),
        ):
            torch.testing.assert_close(changed[0], y[0])
            assert float((changed[1] - y[1]).abs().mean()) > 1e-4


def test_concat_is_joined_to_x():
    network = trained(in_channels=9)
    x, time, cond = told()
    more = torch.randn(2, 5, 8, 8)
    with torch.no_grad():
        found = network(x, time, cond | {"concat": more})
        assert torch.equal(found, network(torch.cat((x, more), 1), time, cond))


@pytest.mark.parametrize("key", ["class_labels", "sizes"])
def test_a_condition_without_a_seat_is_refused(key):
    x, time, cond = told()
    with pytest.raises(ConfigError, match=f"no seat for the condition {key}; there are context, context_mask, pooled,"):
        MMDiT(**SMALL)(x, time, cond | {key: torch.zeros(2, 6)})


@pytest.mark.parametrize("key", ["context", "pooled"])
def test_a_condition_that_it_needs_is_asked_for(key):
    x, time, cond = told()
    del cond[key]
    with pytest.raises(ConfigError, match=f"an MMDiT needs the condition {key}"):
        MMDiT(**SMALL)(x, time, cond)


@pytest.mark.parametrize(
    ("change", "refusal"),
    [
        ({"caption_projection_dim": 64}, "num_attention_heads x attention_head_dim = 32, not 64"),
        ({"qk_norm": "layer_norm"}, "qk_norm is null or 'rms_norm', not 'layer_norm'"),
        ({"dual_attention_layers": [0, 3]}, "dual_attention_layers are of 0 to 2, not 3"),
        (
            {"joint_attention_dim": None},
            "needs a conditioner with text and a pooled output; its joint_attention_dim",
        ),
        ({"pooled_projection_dim": None}, "its pooled_projection_dim None"),
    ],
)
def test_what_cannot_be_built_is_refused(change, refusal):
    with pytest.raises(ConfigError, match=refusal):
        MMDiT(**SMALL | change)


@pytest.mark.parametrize(
    ("height", "width", "refusal"),
    [
        (8, 7, "8x7 is not cut evenly by patch_size 2"),
        (8, 14, "4x7 patches, but positions for 6x6; raise pos_"),
    ],
)
def test_a_latent_that_does_not_fit_is_refused(height, width, refusal):
    _, time, cond = told()
    with pytest.raises(ConfigError, match=refusal):
        MMDiT(**SMALL)(torch.zeros(2, 4, height, width), time, cond)


@pytest.mark.parametrize(
    ("config", "refusal"),
    [
        ({"num_layer": 2}, "unknown key 'num_layer'; did you mean 'num_layers'"),
        ({"gradient_checkpointing": True}, "unknown key 'gradient_checkpointing'"),
        ({"_class_name": "FluxTransformer2DModel"}, "of a FluxTransformer2DModel, not of a SD3Transformer2DModel"),
        ({"qk_norm": "layer_norm"}, "qk_norm is null"),
    ],
)
def test_a_config_that_is_not_of_diffusers_class_is_refused(config, refusal):
    with pytest.raises(ConfigError, match=refusal):
        MMDiT.from_diffusers(SMALL | config)


def test_checkpointing_forgets_what_is_inside_a_block():
    x, time, cond = told()
    kept = []
    for checkpointing in (False, True):
        network, sizes = trained(gradient_checkpointing=checkpointing), []
        with torch.autograd.graph.saved_tensors_hooks(lambda t, s=sizes: s.append(t.numel()) or t, lambda t: t):
            network(x, time, cond)
        kept.append(sum(sizes))
    assert kept[1] < 0.3 * kept[0]


@pytest.mark.parametrize("autocast", [False, True], ids=["weights", "autocast"])
def test_in_bfloat16_no_stream_goes_back_to_float32(autocast):
    network, met = trained(), []
    x, time, cond = told()
    if not autocast:
        network, x = network.bfloat16(), x.bfloat16()
    for module in network.modules():
        if isinstance(module, JointBlock | RMSNorm):
            module.register_forward_hook(lambda m, xs, y: met.extend(y if isinstance(y, tuple) else [y]))
    reference = trained()(*told()).detach()
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        y = network(x, time, cond)
    assert len(met) > 15
    assert {t.dtype for t in met} == {torch.bfloat16}
    assert float((y.detach() - reference).norm() / reference.norm()) < 0.03


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_norm_of_queries_and_keys_is_torchs(dtype):
    torch.manual_seed(0)
    norm, x = RMSNorm(16, eps=1e-6), torch.randn(2, 3, 5, 16).to(dtype).requires_grad_()
    torch.nn.init.normal_(norm.weight)
    direction = torch.randn(2, 3, 5, 16)
    (norm(x) * direction).sum().backward()
    wide, weight = x.detach().float().requires_grad_(), norm.weight.detach().to(dtype).float().requires_grad_()
    expected = F.rms_norm(wide, (16,), weight, 1e-6)
    (expected * direction).sum().backward()
    tolerance = 1e-6 if dtype == torch.float32 else 0.01
    for a, b in ((norm(x), expected), (x.grad, wide.grad), (norm.weight.grad, weight.grad)):
        assert (a - b).norm().item() < tolerance * b.norm().item()


def test_the_tiny_one_composes():
    cfg = load_config(["conditioner=text_tiny", "model=mmdit_tiny", "first_stage=autoencoder_kl_tiny"])
    network = build(cfg.model)
    width = cfg.conditioner.width
    cond = {"context": torch.randn(2, 24, width), "pooled": torch.randn(2, width)}
    y = network(torch.randn(2, cfg.model.in_channels, 16, 16), torch.tensor([3.0, 4.0]), cond)
    assert y.shape == (2, cfg.model.out_channels, 16, 16)
