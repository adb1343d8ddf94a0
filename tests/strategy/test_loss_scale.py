"""The loss scale moves as that of torch's GradScaler."""

import pytest
import torch

from sdtrain.strategy.loss_scale import LossScale


@pytest.mark.parametrize("seed", range(3))
def test_as_torch_does(seed):
    ours, theirs = LossScale(2.0**16, growth_interval=4), torch.amp.GradScaler("cpu", growth_interval=4)
    p = torch.nn.Parameter(torch.ones(2))
    optimizer = torch.optim.SGD([p], lr=1e-9)
    torch.manual_seed(seed)
    for is_finite in (torch.rand(60) > 0.15).tolist():
        theirs.scale(p.sum()).backward()
        if not is_finite:
            p.grad[1] = float("inf")
        theirs.step(optimizer)
        theirs.update()
        optimizer.zero_grad()
        ours.update(is_finite)
        assert ours.scale == theirs.get_scale()


def test_it_goes_on_where_it_was():
    first, second = LossScale(growth_interval=5), LossScale(growth_interval=5)
    for is_finite in (True, False, True, True, True):
        first.update(is_finite)
    second.load_state_dict(first.state_dict())
    for scale in (first, second):
        scale.update(True)
        scale.update(True)
    assert (first.scale, second.scale) == (2.0**16, 2.0**16)
