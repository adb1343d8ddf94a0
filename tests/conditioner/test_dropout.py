"""Dropped conditions: the share asked for, a function of the sample, together in a group."""

import pytest
import torch

from sdtrain.conditioner.dropout import dropped
from sdtrain.conditioner.image import MaskedImage, SourceImage
from sdtrain.conditioner.label import Label
from sdtrain.conditioner.text import Text
from sdtrain.errors import ConfigError
from sdtrain.ops.random import Draw

NUM = 20_000


@pytest.mark.parametrize("share", [0.0, 0.1, 0.464, 1.0])
def test_the_share(share):
    drop = dropped(Draw.of(0, NUM), share, "t5").float().mean()
    assert float(drop) == pytest.approx(share, abs=4 * (share * (1 - share) / NUM) ** 0.5)


def test_a_group_drops_together_and_groups_do_not():
    draw = Draw.of(0, NUM)
    a, again, b, none = (dropped(draw, 0.464, group) for group in ("a", "a", "b", ""))
    assert torch.equal(a, again)
    for pair in ((a, b), (a, none), (b, none)):
        assert float((pair[0] & pair[1]).float().mean()) == pytest.approx(0.464**2, abs=0.015)


def test_it_goes_by_sample():
    ids = torch.arange(64)
    whole = dropped(Draw(0, ids, ids * 0), 0.5)
    assert torch.equal(torch.cat([dropped(Draw(0, part, part * 0), 0.5) for part in ids.split(10)]), whole)
    assert not torch.equal(dropped(Draw(0, ids, ids * 0 + 1), 0.5), whole)


@pytest.mark.parametrize("share", [-0.1, 1.5])
@pytest.mark.parametrize(
    ("make", "name"),
    [
        (lambda share: Text(width=16, num_heads=1, vocab_size=270, dropout=share), "dropout"),
        (lambda share: Label(3, dropout=share), "dropout"),
        (lambda share: SourceImage(dropout=share), "dropout"),
        (lambda share: MaskedImage(whole=share), "whole"),
    ],
)
def test_what_is_no_share_is_refused(make, name, share):
    with pytest.raises(ConfigError, match=f"{name}={share} must be a share, 0 to 1"):
        make(share)
