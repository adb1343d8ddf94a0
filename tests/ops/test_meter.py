"""The meter: work and memory of known computations, with CUDA's ways of mixed precision and attention."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

from sdtrain.ops.meter import measure

MIB = 2**20


def net():
    with torch.device("meta"):
        return nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.SiLU(), nn.Conv2d(8, 8, 3, stride=2), nn.Flatten(2))


def test_work_is_torchs_count_forward_and_backward():
    made, image = net(), torch.empty(2, 3, 16, 16, device="meta")
    with FlopCounterMode(display=False) as counter:
        made(image).sum().backward()
    assert measure(lambda _: made(image).sum()).flops == counter.get_total_flops() > 0


def test_memory_is_what_is_held_at_once():
    def alone(meter):
        x = torch.empty(MIB, dtype=torch.uint8)
        assert meter.live_bytes == MIB
        x = x.view(2, -1)[0]  # no memory of its own
        assert meter.live_bytes == MIB
        y = x + 1
        del x
        assert meter.live_bytes == MIB // 2
        z = torch.empty(3 * MIB // 2, dtype=torch.uint8)
        del y, z

    def of_before(meter):
        before.mul_(2)
        assert meter.live_bytes == 0  # what was there before counts nothing

    before = torch.empty(MIB, device="meta")
    meter = measure(alone)
    assert (meter.peak_bytes, meter.live_bytes) == (2 * MIB, 0)
    measure(of_before)


def test_what_the_backward_needs_is_held_until_then():
    weights = [nn.Parameter(torch.empty(512, 512, device="meta")) for _ in range(3)]
    for p in weights:
        p.grad = torch.zeros_like(p)

    def loss(meter):
        x = torch.empty(1024, 512)
        for p in weights:
            x = F.linear(x, p)
        held.append(meter.live_bytes)
        return x.sum()

    held = []
    meter = measure(loss)
    # The input of each of the three, and the last one's output until it is summed.
    assert held == [4 * 1024 * 512 * 4]
    assert meter.live_bytes == 0
    assert meter.flops == (3 + 3 + 2) * 2 * 1024 * 512 * 512  # the first input has no gradient


def test_mixed_precision_is_cudas():
    linear, norm = nn.Linear(8, 8, device="meta"), nn.LayerNorm(8, device="meta")

    def look(_):
        x = torch.empty(2, 8)
        found["linear"], found["norm"] = linear(x).dtype, norm(linear(x)).dtype
        with torch.autocast("meta", enabled=False):
            found["off"] = linear(x).dtype

    found = {}
    measure(look, torch.bfloat16)
    assert found == {"linear": torch.bfloat16, "norm": torch.float32, "off": torch.float32}
    measure(look)
    assert set(found.values()) == {torch.float32}
    assert torch.autocast is torch.amp.autocast_mode.autocast


def test_weights_are_cast_once_a_forward_and_kept_to_its_end():
    p = nn.Parameter(torch.empty(1024, 1024, device="meta"))

    def loss(meter):
        x = torch.empty(1, 1024)
        a = F.linear(x, p)
        small = meter.live_bytes
        b = F.linear(a, p)
        assert small >= 2 * MIB
        assert meter.live_bytes < small + MIB
        return b.sum()

    measure(loss, torch.bfloat16)


def test_scores_of_attention_are_never_held():
    q = torch.empty(1, 2, 4096, 64, device="meta", requires_grad=True)
    meter = measure(lambda _: F.scaled_dot_product_attention(q, q, q).sum(), torch.bfloat16)
    assert meter.peak_bytes < 2 * 4096 * 4096
    assert meter.flops == 3 * 4 * 2 * 4096 * 4096 * 64  # forward, and a backward of twice that


@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
def test_checkpointed_blocks_hold_less_and_work_more(dtype):
    with torch.device("meta"):
        blocks = nn.ModuleList([nn.Sequential(nn.Linear(256, 1024), nn.GELU(), nn.Linear(1024, 256)) for _ in range(6)])

    def loss(_, checkpointed):
        x = torch.empty(4096, 256)
        for block in blocks:
            x = checkpoint(block, x, use_reentrant=False) if checkpointed else block(x)
        return x.sum()

    plain = measure(lambda m: loss(m, checkpointed=False), dtype)
    again = measure(lambda m: loss(m, checkpointed=True), dtype)
    assert again.peak_bytes < 0.5 * plain.peak_bytes
    assert 1.1 * plain.flops < again.flops < 4 / 3 * plain.flops + 1e6
