"""The MMDiT beside diffusers' SD3Transformer2DModel: the same names, numbers and gradients, strictly loaded both ways;
at full size the same shapes.
"""

import inspect

import pytest
import torch
from diffusers import SD3Transformer2DModel

from sdtrain.config import load_config
from sdtrain.model.mmdit import MMDiT

SMALL = {
    "sample_size": 16,
    "in_channels": 4,
    "num_layers": 3,
    "attention_head_dim": 16,
    "num_attention_heads": 2,
    "joint_attention_dim": 12,
    "caption_projection_dim": 32,
    "pooled_projection_dim": 10,
    "out_channels": 4,
    "pos_embed_max_size": 12,
}
CASES = {
    "sd3": SMALL,
    "sd35_large": SMALL | {"qk_norm": "rms_norm"},
    "sd35_medium": SMALL | {"qk_norm": "rms_norm", "dual_attention_layers": [0, 2]},
    "dual attention, no norm": SMALL | {"dual_attention_layers": [1]},
    "other channels": SMALL | {"in_channels": 9, "patch_size": 4, "num_layers": 1, "pos_embed_max_size": 7},
    "as many out as in": SMALL | {"in_channels": 3, "out_channels": None, "patch_size": 1, "num_layers": 2},
}
FULL = {  # parameters, and tensors with the positions
    "mmdit": (2_028_328_000, 683),
    "mmdit_sd35_medium": (2_243_171_520, 909),
    "mmdit_sd35_large": (8_056_627_520, 1227),
}


def twins(config, **ours_alone):
    """Ours and theirs with the same random weights, none of them zero."""
    torch.manual_seed(0)
    theirs, ours = SD3Transformer2DModel(**config), MMDiT(**config, **ours_alone)
    with torch.no_grad():
        for p in theirs.parameters():
            p.copy_(torch.randn_like(p) * (0.3 if p.dim() == 1 else p[0].numel() ** -0.5))
    ours.load_state_dict(theirs.state_dict())
    theirs.load_state_dict(ours.state_dict())
    return ours, theirs


def told(config, height=8, width=8):
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(2, config["in_channels"], height, width, generator=generator)
    context, pooled = torch.randn(2, 5, 12, generator=generator), torch.randn(2, 10, generator=generator)
    return x, torch.tensor([17.0, 803.5]), context, pooled


@pytest.mark.parametrize("checkpointing", [False, True], ids=["kept", "recomputed"])
@pytest.mark.parametrize("config", CASES.values(), ids=CASES)
def test_numbers_and_gradients_are_those_of_diffusers(config, checkpointing):
    ours, theirs = twins(config, gradient_checkpointing=checkpointing)
    x, time, *text = told(config)
    mine, other = ([t.clone().requires_grad_() for t in (x, *text)] for _ in range(2))
    found = ours(mine[0], time, {"context": mine[1], "pooled": mine[2]})
    expected = theirs(other[0], other[1], other[2], time).sample
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    direction = torch.randn(found.shape, generator=torch.Generator().manual_seed(2))
    (found * direction).sum().backward()
    (expected * direction).sum().backward()
    named = dict(theirs.named_parameters())
    for name, p in ours.named_parameters():  # a key's bias has no gradient but rounding, as softmax forgets it
        reference = named[name].grad
        assert float((p.grad - reference).norm()) <= 1e-4 * float(reference.norm()) + 1e-5, name
    for a, b in zip(mine, other):
        assert float((a.grad - b.grad).norm()) <= 1e-4 * float(b.grad.norm())


@pytest.mark.parametrize("size", [(6, 10), (14, 2), (24, 24)], ids=str)
def test_sizes_that_are_not_square_and_the_largest(size):
    ours, theirs = twins(CASES["sd35_medium"])
    x, time, context, pooled = told(SMALL, *size)
    with torch.no_grad():
        found = ours(x, time, {"context": context, "pooled": pooled})
        torch.testing.assert_close(found, theirs(x, context, pooled, time).sample, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("change", [{}, {"sample_size": 32, "pos_embed_max_size": 9}, {"patch_size": 4}], ids=str)
def test_positions_are_those_of_diffusers(change):
    ours, theirs = MMDiT(**SMALL | change), SD3Transformer2DModel(**SMALL | change)
    torch.testing.assert_close(ours.pos_embed.pos_embed, theirs.pos_embed.pos_embed, rtol=0, atol=1e-6)


@pytest.mark.parametrize("name", FULL)
def test_at_full_size_it_is_stable_diffusion_3(name):
    cfg = load_config([f"model={name}", "first_stage.latent_channels=16", "conditioner=sd3"])
    config = {k: v for k, v in dict(cfg.model).items() if k not in ("_target_", "weights", "gradient_checkpointing")}
    with torch.device("meta"):
        ours, theirs = MMDiT.from_diffusers(config), SD3Transformer2DModel(**config)
    shapes = {name: tuple(p.shape) for name, p in ours.state_dict().items()}
    assert shapes == {name: tuple(p.shape) for name, p in theirs.state_dict().items()}
    count = sum(p.numel() for p in ours.parameters())
    print(f"{name}: {count:,} parameters in {len(shapes)} tensors")
    assert (count, len(shapes)) == FULL[name]


def test_the_defaults_are_those_of_diffusers():
    theirs = inspect.signature(SD3Transformer2DModel).parameters
    ours = inspect.signature(MMDiT).parameters
    assert {name: p.default for name, p in ours.items() if name != "gradient_checkpointing"} == {
        name: p.default for name, p in theirs.items()
    }


def test_a_config_of_diffusers_builds_it():
    theirs = SD3Transformer2DModel(**CASES["sd35_medium"])
    ours = MMDiT.from_diffusers(dict(theirs.config))
    ours.load_state_dict(theirs.state_dict())
    assert ours.transformer_blocks[0].dual_attention
    assert not ours.transformer_blocks[1].dual_attention
