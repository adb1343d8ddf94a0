"""Features of a random network: seeded, of pictures of any size, and telling pictures apart."""

import pytest
import torch

from sdtrain.errors import ConfigError
from sdtrain.metric.random_features import RandomFeatures


def test_the_seed_makes_the_network():
    pictures = torch.randint(0, 256, (4, 3, 48, 48), dtype=torch.uint8)
    torch.manual_seed(1)
    one = RandomFeatures(num_features=16)
    torch.manual_seed(2)
    same, other = RandomFeatures(num_features=16), RandomFeatures(num_features=16, seed=1)
    assert torch.equal(one(pictures), same(pictures))
    assert one(pictures).shape == (4, 16)
    assert one.identity == same.identity != other.identity
    assert not torch.allclose(one(pictures)[0], one(pictures)[1])
    with pytest.raises(ConfigError, match="no resize 'x'"):
        RandomFeatures(resize="x")
