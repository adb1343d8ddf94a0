"""The moving average against one in float64, and the swap that gives every bit back."""

import pytest
import torch
from torch import nn

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
    ema, generator = EMA(network.named_parameters(), decay), torch.Generator().manual_seed(1)
    reference = [p.double() for p in bits(network)]
    for n in range(120):
        shake(network, generator)
        ema.update()
        now = min(decay, (1 + n) / (10 + n))
        reference = [now * old + (1 - now) * new.double() for old, new in zip(reference, bits(network))]
    assert ema.num_updates == 120
    for shadow, expected in zip(ema.shadow, reference):
        torch.testing.assert_close(shadow.double(), expected, rtol=1e-5, atol=1e-5)


def test_swapped_shows_the_average_and_gives_the_same_bits_back(network):
    ema = EMA(network.named_parameters(), 0.5)
    shake(network, torch.Generator().manual_seed(1))
    ema.update()
    own, places = bits(network), [p.data_ptr() for p in network.parameters()]

    def used_and_failed():
        with ema.swapped():
            assert all(torch.equal(p, shadow) for p, shadow in zip(network.parameters(), ema.shadow))
            assert not any(torch.equal(p, mine) for p, mine in zip(network.parameters(), own))
            assert network[0].weight.is_contiguous(memory_format=torch.channels_last)
            raise RuntimeError("inside")

    with pytest.raises(RuntimeError, match="inside"):
        used_and_failed()
    assert all(torch.equal(p, mine) for p, mine in zip(network.parameters(), own))
    assert [p.data_ptr() for p in network.parameters()] == places


def test_training_goes_on_after_a_swap_as_if_there_were_none(network):
    ema = EMA(network.named_parameters(), 0.5)
    optimizer = torch.optim.AdamW(network.parameters(), lr=0.1, fused=True)
    shadow = [s.clone() for s in ema.shadow]
    with ema.swapped():
        pass
    network(torch.ones(1, 3, 8, 8)).square().mean().backward()
    before = bits(network)
    optimizer.step()
    assert not any(torch.equal(p, old) for p, old in zip(network.parameters(), before))
    assert all(torch.equal(now, old) for now, old in zip(ema.shadow, shadow))


def test_its_state_goes_on_where_it_was(network):
    generator = torch.Generator().manual_seed(1)
    ema = EMA(network.named_parameters(), 0.99)
    for _ in range(5):
        shake(network, generator)
        ema.update()
    again = EMA(network.named_parameters(), 0.99)
    again.load_state_dict({name: value.clone() for name, value in ema.state_dict().items()})
    shake(network, generator)
    ema.update()
    again.update()
    assert again.num_updates == 6
    assert all(torch.equal(a, b) for a, b in zip(ema.shadow, again.shadow))


@pytest.mark.parametrize("change", [{"0.extra": torch.zeros(1)}, {"0.weight": None}])
def test_a_state_that_does_not_fit_is_refused(network, change):
    ema = EMA(network.named_parameters(), 0.99)
    state = {name: value for name, value in (ema.state_dict() | change).items() if value is not None}
    with pytest.raises(KeyError, match=next(iter(change))):
        ema.load_state_dict(state)
