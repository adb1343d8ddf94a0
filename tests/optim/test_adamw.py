"""The optimizer's recipe: its schedule, its groups, and what decays."""

import math

import pytest
import torch
from torch import nn

from sdtrain.errors import ConfigError
from sdtrain.optim.adamw import AdamW


@pytest.fixture
def parts():
    torch.manual_seed(0)
    frozen = nn.Linear(2, 2).requires_grad_(False)
    model = nn.ModuleList([nn.Conv2d(3, 4, 3), nn.GroupNorm(2, 4), frozen])
    return {"model": list(model.parameters()), "conditioner": list(nn.Embedding(5, 3).parameters())}


def test_warm_up_is_linear_and_reaches_the_peak():
    recipe = AdamW(warmup_steps=4)
    assert [recipe.factor(step, 100) for step in range(6)] == [0.25, 0.5, 0.75, 1.0, 1.0, 1.0]
    assert AdamW().factor(0, 100) == 1.0


@pytest.mark.parametrize(
    ("decay", "expected"),
    [
        ("constant", [1.0, 1.0, 1.0, 1.0]),
        ("linear", [1.0, 0.775, 0.55, 0.1]),
        ("cosine", [1.0, 0.1 + 0.45 * (1 + math.cos(math.pi / 4)), 0.55, 0.1]),
    ],
)
def test_decay_after_the_warm_up_and_no_further_than_the_end(decay, expected):
    recipe = AdamW(warmup_steps=20, decay=decay, final=0.1)
    assert [recipe.factor(step, 100) for step in (20, 40, 60, 100)] == pytest.approx(expected)
    assert recipe.factor(150, 100) == pytest.approx(expected[-1])


@pytest.mark.parametrize("decay", ["constant", "linear", "cosine"])
def test_a_warm_up_longer_than_the_run_is_never_above_the_peak(decay):
    recipe = AdamW(warmup_steps=50, decay=decay)
    assert all(0 <= recipe.factor(step, 20) <= 1 for step in range(60))


def test_the_schedule_counts_optimizer_steps_and_scales_each_part(parts):
    optimizer, schedule = AdamW(lr=0.1, lr_scale={"conditioner": 0.1}, warmup_steps=2).build(parts, 10)
    rates = []
    for _ in range(3):
        rates.append({group["name"]: group["lr"] for group in optimizer.param_groups})
        optimizer.step()
        schedule.step()
    assert rates == [{"model": pytest.approx(lr), "conditioner": pytest.approx(lr / 10)} for lr in (0.05, 0.1, 0.1)]


def test_only_matrices_decay_and_only_what_learns_is_there(parts):
    optimizer, _ = AdamW(lr=0.1, weight_decay=0.5).build(parts, 10)
    decays = {id(p): group["weight_decay"] for group in optimizer.param_groups for p in group["params"]}
    convolution, bias, scale, shift, *frozen = parts["model"]
    assert decays == {
        **{id(p): 0.5 for p in (convolution, *parts["conditioner"])},
        **{id(p): 0.0 for p in (bias, scale, shift)},
    }
    before = {id(p): p.detach().clone() for values in parts.values() for p in values}
    for p in (p for values in parts.values() for p in values if p.requires_grad):
        p.grad = torch.zeros_like(p)
    optimizer.step()
    torch.testing.assert_close(convolution, before[id(convolution)] * (1 - 0.1 * 0.5))
    assert torch.equal(bias, before[id(bias)])
    assert all(torch.equal(p, before[id(p)]) for p in frozen)


def test_a_step_is_the_papers():
    weight = nn.Parameter(torch.tensor([[2.0, -1.0]]))
    optimizer, _ = AdamW(lr=0.01, betas=(0.8, 0.9), eps=1e-8, weight_decay=0.1).build({"model": [weight]}, 10)
    gradients = torch.tensor([[[0.3, -0.2]], [[-0.1, 0.5]]])
    m, v, expected = torch.zeros(1, 2), torch.zeros(1, 2), weight.detach().clone()
    for step, gradient in enumerate(gradients, start=1):
        weight.grad = gradient.clone()
        optimizer.step()
        m, v = 0.8 * m + 0.2 * gradient, 0.9 * v + 0.1 * gradient**2
        expected *= 1 - 0.01 * 0.1
        expected -= 0.01 * (m / (1 - 0.8**step)) / ((v / (1 - 0.9**step)).sqrt() + 1e-8)
    torch.testing.assert_close(weight.detach(), expected)


def test_a_part_that_has_nothing_to_learn_gives_no_group(parts):
    optimizer, _ = AdamW(lr_scale={"discriminator": 2.0}).build(parts | {"discriminator": []}, 10)
    assert {group["name"] for group in optimizer.param_groups} == {"model", "conditioner"}


def test_what_does_not_exist_is_refused(parts):
    with pytest.raises(ConfigError, match="optim.decay is constant, cosine or linear, not 'step'"):
        AdamW(decay="step")
    with pytest.raises(ConfigError, match="lr_scale names encoder; this stage trains model, conditioner"):
        AdamW(lr_scale={"encoder": 0.1}).build(parts, 10)
