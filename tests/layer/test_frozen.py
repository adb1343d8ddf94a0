"""What is held out of its owner: neither learned, nor saved, nor cast; but moved."""

import torch
from torch import nn

from sdtrain.layer.frozen import Frozen


class Owner(nn.Module):
    def __init__(self):
        super().__init__()
        self.own = nn.Linear(2, 2)
        self.frozen = Frozen(nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2)))


def test_the_owner_neither_learns_nor_saves_it():
    owner = Owner()
    assert [name for name, _ in owner.named_parameters()] == ["own.weight", "own.bias"]
    assert set(owner.state_dict()) == {"own.weight", "own.bias"}
    assert not any(p.requires_grad for p in owner.frozen.module.parameters())


def test_it_stays_in_evaluation_mode():
    owner = Owner()
    assert owner.train().own.training
    assert not owner.frozen.module[1].training


def test_it_moves_with_its_owner_and_keeps_its_precision():
    owner = Owner()
    before = owner.frozen.module[0].weight.clone()
    owner.to(torch.bfloat16)
    assert owner.own.weight.dtype == torch.bfloat16
    assert torch.equal(owner.frozen.module[0].weight, before)
    owner.to("meta")
    assert {p.device.type for p in owner.frozen.module.parameters()} == {"meta"}


def test_gradients_pass_through_it_but_not_into_it():
    owner = Owner()
    x = torch.ones(3, 2, requires_grad=True)
    owner.frozen(owner.own(x)).square().sum().backward()
    assert float(x.grad.norm()) > 0
    assert all(p.grad is None for p in owner.frozen.module.parameters())
