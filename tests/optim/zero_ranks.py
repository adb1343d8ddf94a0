"""One rank of two under DeepSpeed: averages against ones in float64 of the gathered 32-bit weights, for each stage of
ZeRO, and against the same after a swap and after a save and a load. Run by test_ema.py.
"""

import copy
import logging

import deepspeed
import torch
import torch.distributed as dist
from deepspeed.utils import logger, safe_get_full_fp32_param
from torch import nn

from sdtrain.optim.averaging import Exponential, Power
from sdtrain.optim.ema import EMA

PROFILES = [Power(0.1), Power(0.05)]
PERSISTENT_NUMEL = 400  # ZeRO-3 holds parameters up to this size whole


class Net(nn.Module):
    """Odd sizes, which no number of ranks divides, and one parameter that a single rank has."""

    def __init__(self):
        super().__init__()
        self.conv, self.wide, self.out = nn.Conv2d(3, 7, 3), nn.Linear(7 * 36, 301), nn.Linear(301, 1)
        self.scale = nn.Parameter(torch.ones(1))

    def forward(self, x):
        return self.out(torch.tanh(self.wide(self.conv(x).flatten(1)))) * self.scale


def masters(net):
    return [safe_get_full_fp32_param(p).double().clone() for p in net.parameters()]


def step(engine, number, dtype):
    generator = torch.Generator().manual_seed(10 * number + dist.get_rank())
    loss = (engine(torch.randn(2, 3, 8, 8, generator=generator).to(dtype)) - 1).square().mean()
    engine.backward(loss)
    engine.step()


def check(stage, dtype):
    torch.manual_seed(0)
    net = Net()
    plain = copy.deepcopy(net).to(dtype)
    config = {
        "train_micro_batch_size_per_gpu": 2,
        "zero_allow_untested_optimizer": True,
        "zero_optimization": {"stage": stage, "stage3_param_persistence_threshold": PERSISTENT_NUMEL},
        "bf16": {"enabled": dtype == torch.bfloat16},
    }
    engine, *_ = deepspeed.initialize(model=net, optimizer=torch.optim.AdamW(net.parameters(), 1e-2), config=config)
    ema = EMA(net.named_parameters(), PROFILES)
    expected = [masters(net) for _ in PROFILES]
    for number in range(5):
        step(engine, number, dtype)
        ema.update()
        for profile, old in zip(PROFILES, expected):
            kept = profile.kept(number + 1)
            old[:] = [kept * o + (1 - kept) * new for o, new in zip(old, masters(net))]
    state, names = ema.state_dict(), [name for name, _ in net.named_parameters()]
    for values, reference in zip(state.values(), expected):
        for name, value in zip(names, reference):
            torch.testing.assert_close(values[name].double(), value, rtol=1e-5, atol=1e-6)
    assert sum(shadow.numel() for shadow in ema.shadows[0]) <= 0.51 * sum(e.numel() for e in expected[0]) + 10

    plain.load_state_dict({name: state["ema"][name] for name in names})
    x, weights = torch.randn(2, 3, 8, 8).to(dtype), masters(net)
    with torch.no_grad():
        before = net(x)
        with ema.swapped():
            shown = [net(x), net(x)]
        after = net(x)
        torch.testing.assert_close(shown[0], plain(x), rtol=1e-5, atol=1e-5)
    assert torch.equal(*shown)
    assert torch.equal(before, after)
    assert not torch.equal(before, shown[0])
    assert all(torch.equal(now, old) for now, old in zip(masters(net), weights))

    again = EMA(net.named_parameters(), PROFILES)
    again.load_state_dict(state)
    for number in range(5, 8):
        step(engine, number, dtype)
        ema.update()
        again.update()
    for one, other in zip(ema.state_dict().values(), again.state_dict().values()):
        assert all(torch.equal(value, other[name]) for name, value in one.items())
    assert EMA(net.named_parameters(), [Exponential(0.9)]).state_dict(is_kept=False) == {}
    engine.destroy()
    with ema.swapped():
        pass


if __name__ == "__main__":
    logger.setLevel(logging.ERROR)
    deepspeed.init_distributed(dist_backend="gloo", verbose=False)
    for one_stage in (1, 2, 3):
        for one_dtype in (torch.float32, torch.bfloat16):
            check(one_stage, one_dtype)
    print("zero 1 2 3, float32 and bfloat16: equal", flush=True)
    dist.barrier()
    dist.destroy_process_group()
