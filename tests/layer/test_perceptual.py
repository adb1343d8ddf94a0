"""LPIPS by hand, the files it reads, and what it says of those it cannot."""

from pathlib import Path

import pytest
import torch
import torchmetrics
from safetensors.torch import save_file

from sdtrain.errors import ConfigError
from sdtrain.layer.perceptual import Perceptual
from sdtrain.layer.vgg import VGG

WIDTHS = ((4, 6), (8,))
TORCHMETRICS = Path(torchmetrics.__file__).parent / "functional/image/lpips_models/vgg.pth"


@pytest.fixture
def weights(tmp_path):
    torch.manual_seed(0)
    path = tmp_path / "vgg.safetensors"
    save_file({name: tensor.contiguous() for name, tensor in VGG(WIDTHS).state_dict().items()}, path)
    return str(path)


@pytest.fixture
def heads(tmp_path):
    path = tmp_path / "heads.pth"
    torch.save({f"lin{i}.model.1.weight": torch.rand(1, n, 1, 1) for i, n in enumerate((6, 8))}, path)
    return str(path)


@pytest.fixture
def pictures():
    return torch.rand(2, 3, 3, 16, 16, generator=torch.Generator().manual_seed(1)) * 2 - 1


def test_a_picture_is_at_no_distance_from_itself(weights, pictures):
    perceptual = Perceptual(WIDTHS, weights)
    assert perceptual(pictures[0], pictures[0]).tolist() == [0, 0, 0]
    assert (perceptual(*pictures) > 0).all()


@pytest.mark.parametrize("learned", [False, True])
def test_it_is_the_equation(weights, heads, learned, pictures):
    perceptual = Perceptual(WIDTHS, weights, heads if learned else None)
    state = torch.load(heads, weights_only=True)
    mean = torch.tensor([0.485, 0.456, 0.406]).view(3, 1, 1)
    std = torch.tensor([0.229, 0.224, 0.225]).view(3, 1, 1)
    taps = [perceptual.vgg(((picture + 1) / 2 - mean) / std) for picture in pictures]  # ImageNet's, for [0, 1]
    expected = torch.zeros(3)
    for i, (ours, theirs) in enumerate(zip(*taps)):
        weight = state[f"lin{i}.model.1.weight"] if learned else 1 / ours.shape[1]
        ours, theirs = (taken / taken.norm(dim=1, keepdim=True).clamp(min=1e-6) for taken in (ours, theirs))
        expected += (weight * (ours - theirs) ** 2).sum(1).mean((1, 2))
    torch.testing.assert_close(perceptual(*pictures), expected, rtol=5e-3, atol=1e-5)


def test_gradients_reach_the_picture_alone(weights, pictures):
    perceptual = Perceptual(WIDTHS, weights)
    image, reference = (picture.clone().requires_grad_() for picture in pictures)
    perceptual(image, reference).sum().backward()
    assert (image.grad.flatten(1).norm(dim=1) > 0).all()
    assert reference.grad is None
    assert all(p.grad is None and not p.requires_grad for p in perceptual.parameters())


def test_the_linear_heads_of_torchmetrics_fit():
    with torch.device("meta"):
        widths = Perceptual().vgg.num_features
    learned = torch.load(TORCHMETRICS, weights_only=True, map_location="cpu")
    perceptual = Perceptual([[3, n] for n in widths], heads=str(TORCHMETRICS))
    for i, head in enumerate(perceptual.heads):
        assert torch.equal(head, learned[f"lin{i}.model.1.weight"])
        assert not head.requires_grad


def test_a_file_of_torchs_loads_and_its_classifier_is_left_alone(tmp_path, weights, pictures):
    path = tmp_path / "vgg.pth"
    torch.manual_seed(0)
    torch.save(VGG(WIDTHS).state_dict() | {"classifier.0.weight": torch.zeros(2, 2)}, path)
    assert torch.equal(Perceptual(WIDTHS, str(path))(*pictures), Perceptual(WIDTHS, weights)(*pictures))


def test_without_weights_it_gives_no_number(weights, pictures):
    perceptual = Perceptual(WIDTHS)
    with pytest.raises(RuntimeError, match="no weights yet"):
        perceptual(*pictures)
    perceptual.load(weights)
    assert perceptual(*pictures).isfinite().all()


@pytest.mark.parametrize("key", ["weights", "heads"])
def test_a_missing_file_is_named_with_where_to_get_it(key):
    with pytest.raises(ConfigError, match="vgg16-397923af.pth") as told:
        Perceptual(WIDTHS, **{key: "nowhere/file.pth"})
    first_line = str(told.value).splitlines()[0]
    assert f"perceptual.{key}: no file nowhere/file.pth" in first_line
    assert "https://download.pytorch.org/models/vgg16-397923af.pth" in first_line
    assert "torchmetrics/functional/image/lpips_models/vgg.pth" in first_line


@pytest.mark.parametrize("key", ["weights", "heads"])
@pytest.mark.parametrize("name", ["bad.pth", "bad.safetensors"])
def test_a_file_that_is_none_is_named(tmp_path, key, name):
    path = tmp_path / name
    path.write_bytes(b"<html>404 Not Found</html>")
    with pytest.raises(ConfigError, match=f"perceptual.{key}: .*{name}"):
        Perceptual(WIDTHS, **{key: str(path)})


def test_files_of_another_network_are_named(weights, heads):
    with pytest.raises(ConfigError, match=r"perceptual.weights: .*vgg.safetensors does not fit: .*features\.0\.weight"):
        Perceptual(((5, 6), (8,)), weights)
    with pytest.raises(ConfigError, match=r"perceptual.heads: .*heads.pth does not fit"):
        Perceptual(((4, 6), (9,)), heads=heads)
    with pytest.raises(ConfigError, match=r"perceptual.heads: .*heads.pth does not fit"):
        Perceptual(((4, 6), (8,), (9,)), heads=heads)
