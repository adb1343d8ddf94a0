"""Muon: matrices by orthogonal steps, the rest as AdamW, state that resumes."""

import copy

import pytest
import torch
from torch import nn

from sdtrain.optim.muon import Muon, orthogonalise


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(2, 24, 200), (1, 160, 30), (3, 32, 32)])
def test_singular_values_become_about_one(shape, dtype):
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    found = torch.linalg.svdvals(orthogonalise(x, dtype))
    assert found.max() < 1.3
    assert found.median() > 0.6


def test_bfloat16_goes_where_float64_does():
    """Of gradients whose singular values span four decades; an iteration of x x^T alone would end at 0.74."""
    left, right = (
        torch.linalg.qr(torch.randn(128, 128, generator=torch.Generator().manual_seed(i)))[0] for i in (0, 1)
    )
    x = ((left * torch.logspace(0, -4, 128)) @ right)[None]
    found = torch.cosine_similarity(
        orthogonalise(x, torch.bfloat16).flatten(), orthogonalise(x.double(), torch.float64).float().flatten(), dim=0
    )
    assert found > 0.99


@pytest.mark.parametrize(("precision", "dtype"), [("32-true", torch.float32), ("bf16-mixed", torch.bfloat16)])
def test_the_iteration_is_in_the_precision_of_the_run(precision, dtype):
    ours = nn.Linear(24, 24, bias=False)
    before = ours.weight.detach().clone()
    ours.weight.grad = torch.randn(24, 24, generator=torch.Generator().manual_seed(0))
    optimizer, _ = Muon(lr=1.0, weight_decay=0.0, momentum=0.0, precision=precision).build({"all": [ours.weight]}, 10)
    optimizer.step()
    expected = before - 0.2 * 24**0.5 * orthogonalise(ours.weight.grad[None], dtype)[0]
    torch.testing.assert_close(ours.weight.detach(), expected, rtol=0, atol=1e-6)


def test_it_is_the_polar_factor_in_direction():
    x = torch.randn(1, 16, 60, generator=torch.Generator().manual_seed(0))
    u, _, vh = torch.linalg.svd(x[0], full_matrices=False)
    ours = orthogonalise(x)[0]
    assert torch.cosine_similarity(ours.flatten(), (u @ vh).flatten(), dim=0) > 0.97


def model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 8, 3), nn.GroupNorm(2, 8), nn.Flatten(), nn.Linear(8 * 36, 4))


def train(module: nn.Module, optimizer: torch.optim.Optimizer, steps: range) -> None:
    for step in steps:
        x = torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(step))
        optimizer.zero_grad()
        module(x).square().mean().backward()
        optimizer.step()


def test_vectors_move_as_under_adamw_and_matrices_by_the_rate():
    ours = model()
    before = copy.deepcopy(ours)
    peer = copy.deepcopy(ours)
    optimizer, _ = Muon(lr=1e-2, weight_decay=0.0).build({"all": list(ours.parameters())}, 10)
    train(ours, optimizer, range(1))
    vectors = [p for p in peer.parameters() if p.dim() < 2]
    train(peer, torch.optim.AdamW(vectors, lr=1e-2, betas=(0.9, 0.99), eps=1e-8, weight_decay=0.0), range(1))
    for (name, p), q, b in zip(ours.named_parameters(), peer.parameters(), before.parameters()):
        if p.dim() < 2:
            torch.testing.assert_close(p, q)
        else:  # 0.2 an element times the rate, about, whatever the gradient's size
            assert float((p - b).detach().square().mean().sqrt()) == pytest.approx(2e-3, rel=0.5), name


def test_state_resumes_to_the_same_bits():
    whole, half = model(), model()
    first, _ = Muon(lr=1e-2).build({"all": list(whole.parameters())}, 10)
    train(whole, first, range(6))
    second, _ = Muon(lr=1e-2).build({"all": list(half.parameters())}, 10)
    train(half, second, range(3))
    third, _ = Muon(lr=1e-2).build({"all": list(half.parameters())}, 10)
    third.load_state_dict(copy.deepcopy(second.state_dict()))
    train(half, third, range(3, 6))
    assert all(torch.equal(p, q) for p, q in zip(whole.parameters(), half.parameters()))


def test_what_is_clipped_is_clipped_within_the_step():
    ours, peer = model(), model()
    for module, clips in ((ours, True), (peer, False)):
        optimizer, _ = Muon(lr=1e-2).build({"all": list(module.parameters())}, 10)
        for p in module.parameters():
            p.grad = torch.linspace(0.5, 1.5, p.numel()).view(p.shape)
        norm = nn.utils.get_total_norm([p.grad for p in module.parameters()])
        if clips:
            optimizer.clip({"all": norm}, 1e-3)
        else:
            nn.utils.clip_grads_with_norm_(module.parameters(), 1e-3, norm)
        optimizer.step()
    for p, q in zip(ours.parameters(), peer.parameters()):
        torch.testing.assert_close(p, q)
        torch.testing.assert_close(p.grad, q.grad)
