"""VGG: the parameters of torchvision's VGG16, and where its features are taken."""

import torch
from torch.nn import functional as F

from sdtrain.layer.vgg import VGG

# torchvision.models.vgg16().state_dict(), without its classifier
TORCHVISION = {
    0: (64, 3),
    2: (64, 64),
    5: (128, 64),
    7: (128, 128),
    10: (256, 128),
    12: (256, 256),
    14: (256, 256),
    17: (512, 256),
    19: (512, 512),
    21: (512, 512),
    24: (512, 512),
    26: (512, 512),
    28: (512, 512),
}


def test_parameters_are_torchvisions():
    with torch.device("meta"):
        state = VGG().state_dict()
    expected = {}
    for place, (outputs, inputs) in TORCHVISION.items():
        expected[f"features.{place}.weight"] = (outputs, inputs, 3, 3)
        expected[f"features.{place}.bias"] = (outputs,)
    assert {name: tuple(tensor.shape) for name, tensor in state.items()} == expected


def test_features_are_taken_behind_the_last_relu_of_each_block():
    with torch.device("meta"):
        assert VGG().taps == [3, 8, 15, 22, 29]  # relu1_2, relu2_2, relu3_3, relu4_3, relu5_3 (Zhang et al. 2018)
    torch.manual_seed(0)
    network = VGG(((4, 6), (8,)))
    x = torch.randn(2, 3, 8, 8)
    state = network.state_dict()

    def convolved(x, place):
        return F.relu(F.conv2d(x, state[f"features.{place}.weight"], state[f"features.{place}.bias"], padding=1))

    first = convolved(convolved(x, 0), 2)
    second = convolved(F.max_pool2d(first, 2), 5)
    assert network.num_features == [6, 8]
    assert network.features[2].weight.is_contiguous(memory_format=torch.channels_last)
    for found, expected in zip(network(x), (first, second), strict=True):
        torch.testing.assert_close(found, expected)
        assert found.is_contiguous(memory_format=torch.channels_last)
