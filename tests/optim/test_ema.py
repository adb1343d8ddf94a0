"""Moving averages against ones in float64, what a rank owns of them, and the swap that gives every bit back."""

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from sdtrain.errors import ConfigError
from sdtrain.optim import ema as module
from sdtrain.optim.averaging import Exponential, Power, exponent_of
from sdtrain.optim.ema import EMA


@pytest.fixture
def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.GroupNorm(2, 4)).to(memory_format=torch.channels_last)


def shake(network, generator):
    with torch.no_grad():
        for p in network.parameters():
            p.add_(torch.randn(p.shape, generator=generator))


def bits(network):
    return [p.detach().clone() for p in network.parameters()]


@pytest.mark.parametrize("decay", [0.5, 0.9, 0.9999])
def test_it_follows_the_reference(network, decay):
    ema, generator = EMA(network.named_parameters(), [Exponential(decay)]), torch.Generator().manual_seed(1)
    reference = [p.double() for p in bits(network)]
    for n in range(120):
        shake(network, generator)
        ema.update()
        now = min(decay, (1 + n) / (10 + n))
        reference = [now * old + (1 - now) * new.double() for old, new in zip(reference, bits(network))]
    assert ema.num_updates == 120
    for shadow, expected in zip(ema.shadows[0], reference):
        torch.testing.assert_close(shadow.double(), expected, rtol=1e-5, atol=1e-5)


def test_power_functions_weigh_every_step_as_they_should(network):
    lengths = (0.05, 0.10, 0.25)
    ema, generator = EMA(network.named_parameters(), [Power(length) for length in lengths]), torch.Generator()
    history = []
    for _ in range(100):
        shake(network, generator)
        ema.update()
        history.append(bits(network))
    for length, shadows in zip(lengths, ema.shadows):
        ends = torch.linspace(0, 1, 101, dtype=torch.float64) ** (exponent_of(length) + 1)
        weights = ends.diff()  # the integral of the profile over each step; of the initial weights nothing is left
        for number, shadow in enumerate(shadows):
            values = torch.stack([step[number] for step in history]).double()
            expected = torch.tensordot(weights, values, 1)
            torch.testing.assert_close(shadow.double(), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("chunk_bytes", [1, 200, 1 << 28])
def test_weights_of_16_bits_are_averaged_in_32(network, chunk_bytes, monkeypatch):
    """In 16 bits, a thousandth of a change is rounded away, and the average never moves."""
    monkeypatch.setattr(module, "CHUNK_BYTES", chunk_bytes)
    network.bfloat16()
    ema, generator = EMA(network.named_parameters(), [Exponential(0.999), Power(0.1)]), torch.Generator()
    ema.num_updates = 10_000  # past the warm-up
    reference = [[p.double() for p in bits(network)] for _ in ema.profiles]
    for n in range(10_001, 10_081):
        shake(network, generator)
        ema.update()
        for profile, old in zip(ema.profiles, reference):
            kept = profile.kept(n)
            old[:] = [kept * o + (1 - kept) * new.double() for o, new in zip(old, bits(network))]
    for shadows, expected in zip(ema.shadows, reference):
        for shadow, e in zip(shadows, expected):
            torch.testing.assert_close(shadow.double(), e, rtol=1e-5, atol=1e-5)
    own = bits(network)
    with ema.swapped():  # the network goes on in its own precision
        assert network(torch.ones(1, 3, 8, 8, dtype=torch.bfloat16)).dtype == torch.bfloat16
        assert all(torch.equal(p, s.bfloat16()) for p, s in zip(network.parameters(), ema.shadows[0]))
    assert all(torch.equal(p, mine) for p, mine in zip(network.parameters(), own))


def test_so_many_bytes_at_once_are_held_in_32_bits(monkeypatch):
    monkeypatch.setattr(module, "CHUNK_BYTES", 40)
    parts = module._chunks([torch.zeros(n, dtype=torch.bfloat16) for n in (5, 5, 1, 30, 2, 2)])
    assert parts == [slice(0, 2), slice(2, 3), slice(3, 4), slice(4, 6)]
    assert module._chunks([torch.zeros(100)]) is None


def test_swapped_shows_the_average_and_gives_the_same_bits_back(network):
    ema = EMA(network.named_parameters(), [Exponential(0.5)])
    shake(network, torch.Generator().manual_seed(1))
    ema.update()
    own, places = bits(network), [p.data_ptr() for p in network.parameters()]

    def used_and_failed():
        with ema.swapped():
            assert all(torch.equal(p, shadow) for p, shadow in zip(network.parameters(), ema.shadows[0]))
            assert not any(torch.equal(p, mine) for p, mine in zip(network.parameters(), own))
            assert network[0].weight.is_contiguous(memory_format=torch.channels_last)
            raise RuntimeError("inside")

    with pytest.raises(RuntimeError, match="inside"):
        used_and_failed()
    assert all(torch.equal(p, mine) for p, mine in zip(network.parameters(), own))
    assert [p.data_ptr() for p in network.parameters()] == places


def test_training_goes_on_after_a_swap_as_if_there_were_none(network):
    ema = EMA(network.named_parameters(), [Exponential(0.5)])
    optimizer = torch.optim.AdamW(network.parameters(), lr=0.1, fused=True)
    shadow = [s.clone() for s in ema.shadows[0]]
    with ema.swapped():
        pass
    network(torch.ones(1, 3, 8, 8)).square().mean().backward()
    before = bits(network)
    optimizer.step()
    assert not any(torch.equal(p, old) for p, old in zip(network.parameters(), before))
    assert all(torch.equal(now, old) for now, old in zip(ema.shadows[0], shadow))


@pytest.mark.parametrize("profiles", [[Exponential(0.99)], [Power(0.05), Power(0.1)]])
def test_its_state_goes_on_where_it_was(network, profiles):
    generator = torch.Generator().manual_seed(1)
    ema = EMA(network.named_parameters(), profiles)
    for _ in range(5):
        shake(network, generator)
        ema.update()
    again = EMA(network.named_parameters(), profiles)
    state = ema.state_dict()
    assert list(state) == ["ema", "ema_0.100"][: len(profiles)]
    again.load_state_dict({stem: {name: t.clone() for name, t in values.items()} for stem, values in state.items()})
    shake(network, generator)
    ema.update()
    again.update()
    assert again.num_updates == 6
    for mine, other in zip(ema.shadows, again.shadows):
        assert all(torch.equal(a, b) for a, b in zip(mine, other))


@pytest.mark.parametrize("change", [{"0.extra": torch.zeros(1)}, {"0.weight": None}])
def test_a_state_that_does_not_fit_is_refused(network, change):
    ema = EMA(network.named_parameters(), [Exponential(0.99)])
    state = {name: value for name, value in (ema.state_dict()["ema"] | change).items() if value is not None}
    with pytest.raises(KeyError, match=next(iter(change))):
        ema.load_state_dict({"ema": state})


def test_lengths_are_those_of_the_start_of_training(network):
    state = EMA(network.named_parameters(), [Power(0.05), Power(0.1)]).state_dict()
    for profiles, told in (
        ([Power(0.1), Power(0.05)], "holds lengths \\[0.05, 0.1\\], this run asks for lengths \\[0.1, 0.05\\]"),
        ([Power(0.05)], "this run asks for lengths \\[0.05\\]"),
        ([Exponential(0.9)], "this run asks for an exponential average"),
    ):
        with pytest.raises(ConfigError, match=told):
            EMA(network.named_parameters(), profiles).load_state_dict(state)


@pytest.mark.slow
def test_under_zero_each_rank_averages_its_part_of_the_32_bit_weights():
    """All stages of ZeRO on two processes, in 32 and 16 bits: see the script, which says what it compares."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    root = Path(__file__).parents[2]
    environment = os.environ | {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "PYTHONPATH": str(root)}
    environment |= {"WORLD_SIZE": "2", "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"}
    command = [sys.executable, str(Path(__file__).with_name("zero_ranks.py"))]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    ranks = [
        subprocess.Popen(command, env=environment | {"RANK": rank, "LOCAL_RANK": rank}, **pipes) for rank in ("0", "1")
    ]
    try:
        output = [process.communicate(timeout=240)[0] for process in ranks]
    finally:
        for process in ranks:
            process.kill()
            process.wait()
    assert [process.returncode for process in ranks] == [0, 0], output[0][-2000:] + output[1][-2000:]
    assert "zero 1 2 3, float32 and bfloat16: equal" in output[0]
