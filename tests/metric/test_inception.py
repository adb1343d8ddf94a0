"""The FID's Inception against the published file's layout, and the three resizes. There are no real weights here."""

import pytest
import torch

from sdtrain.errors import ConfigError
from sdtrain.metric.extractor import bicubic_antialiased, bilinear, legacy_bilinear
from sdtrain.metric.inception import Inception, InceptionV3, _pooled

# Of pt_inception-2015-12-05-6726825d.pth, as published: some convolutions of every block, and the classifier.
SHAPES = {
    "Conv2d_1a_3x3.conv.weight": (32, 3, 3, 3),
    "Conv2d_4a_3x3.bn.running_var": (192,),
    "Mixed_5b.branch5x5_2.conv.weight": (64, 48, 5, 5),
    "Mixed_5b.branch_pool.conv.weight": (32, 192, 1, 1),
    "Mixed_5d.branch3x3dbl_3.conv.weight": (96, 96, 3, 3),
    "Mixed_6a.branch3x3.conv.weight": (384, 288, 3, 3),
    "Mixed_6b.branch7x7_2.conv.weight": (128, 128, 1, 7),
    "Mixed_6b.branch7x7dbl_2.conv.weight": (128, 128, 7, 1),
    "Mixed_6e.branch7x7dbl_5.conv.weight": (192, 192, 1, 7),
    "Mixed_7a.branch7x7x3_4.conv.weight": (192, 192, 3, 3),
    "Mixed_7b.branch3x3_2a.conv.weight": (384, 384, 1, 3),
    "Mixed_7b.branch3x3dbl_3b.conv.weight": (384, 384, 3, 1),
    "Mixed_7c.branch3x3dbl_1.conv.weight": (448, 2048, 1, 1),
    "Mixed_7c.branch_pool.conv.weight": (192, 2048, 1, 1),
    "fc.weight": (1008, 2048),
    "fc.bias": (1008,),
}


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    torch.manual_seed(0)
    state = {k: v for k, v in InceptionV3().state_dict().items() if "num_batches" not in k}
    path = tmp_path_factory.mktemp("inception") / "weights.pth"
    torch.save(state, path)
    return path


def test_the_layout_is_the_published_one():
    with torch.device("meta"):
        network = InceptionV3()
    state = network.state_dict()
    assert {name: tuple(state[name].shape) for name in SHAPES} == SHAPES
    assert sum(name.endswith("conv.weight") for name in state) == 94
    assert sum(p.numel() for p in network.parameters()) == 23_834_568 + 8 * 2049  # torchvision's, and 8 more classes


def test_features_and_logits_from_a_file(file):
    network = Inception(str(file))
    pictures = torch.randint(0, 256, (2, 3, 20, 20), dtype=torch.uint8)
    features = network(pictures)
    assert features.shape == (2, 2048)
    assert network.logits(features).shape == (2, 1008)
    assert torch.allclose(network(pictures[:1]), features[:1], atol=1e-4)  # no picture sees its neighbours
    assert len(network.identity["sha256"]) == 64


def test_the_pools_are_the_graphs():
    ones = torch.ones(1, 1, 4, 4)
    assert torch.equal(_pooled(ones, "average"), ones)  # the padding is left out
    assert torch.equal(_pooled(-ones, "maximum"), -ones)
    with torch.device("meta"):
        network = InceptionV3()
    assert (network.Mixed_7b.pool, network.Mixed_7c.pool) == ("average", "maximum")


def test_a_file_that_does_not_fit_is_named(file, tmp_path):
    with pytest.raises(ConfigError, match="it wants pt_inception-2015-12-05-6726825d.pth"):
        Inception(str(tmp_path / "absent.pth"))
    torch.save({"fc.weight": torch.zeros(2, 2)}, tmp_path / "other.pth")
    with pytest.raises(ConfigError, match="does not fit"):
        Inception(str(tmp_path / "other.pth"))
    (tmp_path / "text.pth").write_text("no weights")
    with pytest.raises(ConfigError, match="cannot be read as weights"):
        Inception(str(tmp_path / "text.pth"))
    with pytest.raises(ConfigError, match="no resize 'nearest'"):
        Inception(str(file), resize="nearest")


def test_resizes():
    row = torch.tensor([0.0, 100.0]).expand(1, 1, 2, 2)
    assert legacy_bilinear(row, 4)[0, 0, 0].tolist() == [0, 50, 100, 100]  # no half-pixel shift
    assert bilinear(row, 4)[0, 0, 0].tolist() == [0, 25, 75, 100]
    import numpy as np
    from PIL import Image

    picture = torch.rand(1, 1, 50, 50, generator=torch.Generator().manual_seed(0)) * 255
    pillow = Image.fromarray(picture[0, 0].numpy()).resize((20, 20), Image.Resampling.BICUBIC)
    np.testing.assert_allclose(bicubic_antialiased(picture, 20)[0, 0].numpy(), np.asarray(pillow), atol=0.01)
