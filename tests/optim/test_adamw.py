"""The optimizer: its schedule, its groups, what decays, and that a step is one pass."""

import copy
import math

import pytest
import torch
from torch import nn
from torch.profiler import ProfilerActivity, profile

from sdtrain.errors import ConfigError
from sdtrain.optim.adamw import AdamW, OnePass


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


@pytest.mark.parametrize(
    "values", [{"lr": -1e-4}, {"weight_decay": -0.1}, {"warmup_steps": -1}, {"betas": (0.9, 1.0)}, {"betas": (0.9,)}]
)
def test_a_value_that_would_train_wrongly_is_refused(values):
    with pytest.raises(ConfigError, match=f"optim.{next(iter(values))}="):
        AdamW(**values)


def network():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Conv2d(8, 5, 1), nn.GroupNorm(1, 5), nn.Flatten(), nn.Linear(80, 4))
    return net.to(memory_format=torch.channels_last)


def two_groups(net):
    parameters = list(net.parameters())
    return {"first": parameters[:3], "second": parameters[3:]}


def one_pass(net):
    groups = [{"params": some, "name": name, "weight_decay": 0.1} for name, some in two_groups(net).items()]
    return OnePass(groups, (0.9, 0.99), 1e-8)


def train(net, optimizer, clip, steps, max_norm=1.0):
    """Gradients of the first group come out far above the norm of 1, those of the second below it."""
    for step in steps:
        x = torch.randn(4, 3, 6, 6, generator=torch.Generator().manual_seed(step))
        optimizer.zero_grad()
        net(x).square().mean().backward()
        for name, some in two_groups(net).items():
            for p in some:
                p.grad.mul_(100.0 if name == "first" else 0.01)
        clip(optimizer, {name: [p.grad for p in some] for name, some in two_groups(net).items()}, max_norm)
        optimizer.step()


def in_the_step(optimizer, gradients, max_norm):
    optimizer.clip({name: nn.utils.get_total_norm(some) for name, some in gradients.items()}, max_norm)


def in_a_pass(optimizer, gradients, max_norm):
    for some in gradients.values():
        coefficient = max_norm / (nn.utils.get_total_norm(some) + 1e-6)
        torch._foreach_mul_(some, coefficient.clamp(max=1.0))


def values(net, optimizer):
    return [
        value
        for p in net.parameters()
        for value in (p.detach(), p.grad, *map(optimizer.state[p].get, ("exp_avg", "exp_avg_sq")))
    ]


def test_a_step_that_clips_is_torchs_after_clip_grad_norm():
    """Weights, gradients left behind and moments, to rounding: dividing is not multiplying by one over it."""
    ours, peer = network(), network()
    optimizer, theirs = one_pass(ours), torch.optim.AdamW(peer.parameters(), betas=(0.9, 0.99), weight_decay=0.1)
    for group in optimizer.param_groups:
        group["lr"] = 1e-3
    train(ours, optimizer, in_the_step, range(6))
    train(peer, theirs, in_a_pass, range(6))
    assert nn.utils.get_total_norm([p.grad for p in two_groups(ours)["first"]]) == pytest.approx(1.0, rel=1e-5)
    for own, other in zip(values(ours, optimizer), values(peer, theirs)):
        torch.testing.assert_close(own, other, rtol=2e-5, atol=1e-7)


def test_below_the_norm_a_step_is_torchs_to_the_bit():
    ours, peer = network(), network()
    optimizer = one_pass(ours)
    theirs = torch.optim.AdamW(peer.parameters(), betas=(0.9, 0.99), weight_decay=0.1, fused=True)
    train(ours, optimizer, in_the_step, range(3), max_norm=1e9)
    train(peer, theirs, lambda *_: None, range(3))
    assert all(map(torch.equal, values(ours, optimizer), values(peer, theirs)))


def test_a_step_is_divided_by_its_own_norms():
    net = network()
    optimizer = one_pass(net)
    train(net, optimizer, in_the_step, range(1))
    train(net, optimizer, lambda *_: None, range(1, 2))
    assert nn.utils.get_total_norm([p.grad for p in two_groups(net)["first"]]) > 10


def test_nothing_is_copied():
    """torch's CPU kernel makes copies of what is not contiguous."""
    net = network()
    optimizer = one_pass(net)
    train(net, optimizer, in_the_step, range(1))
    with profile(activities=[ProfilerActivity.CPU]) as profiled:
        optimizer.step()
    names = {event.name for event in profiled.events()}
    assert "aten::_fused_adamw_" in names
    assert not names & {"aten::clone", "aten::contiguous"}


def test_state_resumes_to_the_same_bits():
    whole, half = network(), network()
    first, second, third = one_pass(whole), one_pass(half), one_pass(half)
    train(whole, first, in_the_step, range(6))
    train(half, second, in_the_step, range(3))
    state = copy.deepcopy(second.state_dict())
    assert state.keys() == torch.optim.AdamW(half.parameters()).state_dict().keys()
    third.load_state_dict(state)
    train(half, third, in_the_step, range(3, 6))
    assert all(map(torch.equal, values(whole, first), values(half, third)))


def test_bfloat16_weights_are_clipped_too():
    net = network().bfloat16()
    optimizer = one_pass(net)
    for p in net.parameters():
        p.grad = torch.ones_like(p)
    in_the_step(optimizer, {name: [p.grad for p in some] for name, some in two_groups(net).items()}, 0.5)
    optimizer.step()
    assert float(nn.utils.get_total_norm([p.grad for p in two_groups(net)["first"]])) == pytest.approx(0.5, rel=1e-2)
