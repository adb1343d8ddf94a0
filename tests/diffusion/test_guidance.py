"""Classifier-free guidance by hand."""

import pytest
import torch

from sdtrain.diffusion.guidance import ClassifierFree, stack
from sdtrain.errors import ConfigError

COND = {"context": torch.full((2, 1, 1), 3.0), "concat": torch.full((2, 1, 1, 1), 5.0)}
NULL = {"context": torch.full((2, 1, 1), 1.0), "concat": torch.full((2, 1, 1, 1), 5.0)}
SAID = {"context": torch.zeros(2, 1, 1)}
X = torch.arange(2.0).view(2, 1, 1, 1)


@pytest.fixture
def network():
    """x0 = x + 10 t + context, and how large each of its batches was."""

    def x0_of(x, t, cond):
        assert cond["concat"].shape[0] == x.shape[0]
        x0_of.sizes.append(x.shape[0])
        return x + 10 * t + cond["context"][..., None]

    x0_of.sizes = []
    return x0_of


@pytest.mark.parametrize("scale", [0.0, 0.5, 3.0, 7.5])
def test_it_moves_from_null_past_conditional(network, scale):
    found = ClassifierFree(scale)(network, COND, NULL)(X, 0.5)
    torch.testing.assert_close(found, X + 5 + 1 + scale * (3 - 1))
    assert network.sizes == [4]


def test_scale_one_is_the_conditional_prediction_and_costs_half(network):
    assert torch.equal(ClassifierFree(1.0)(network, COND, NULL)(X, 0.5), X + 5 + 3)
    assert network.sizes == [2]


def test_outside_of_the_interval_there_is_no_guidance(network):
    denoise = ClassifierFree(3.0, interval=(0.2, 0.6))(network, COND, NULL)
    for t, guided in ((0.1, False), (0.2, True), (0.6, True), (0.7, False)):
        torch.testing.assert_close(denoise(X, t), X + 10 * t + (1 + 3 * 2 if guided else 3))


@pytest.mark.parametrize("share", [0.7, 1.0])
def test_rescaling_moves_the_spread_of_each_picture_back(share):
    told, null, x = torch.randn(3, 2, 4, 8, 8, generator=torch.Generator().manual_seed(0))

    def network(x, t, cond):
        return torch.cat((told, null)) if len(x) == 4 else told

    found = ClassifierFree(7.5, rescale=share)(network, SAID, SAID)(x, 0.5)
    guided = null + 7.5 * (told - null)
    for picture in range(2):
        factor = told[picture].std() / guided[picture].std()
        torch.testing.assert_close(found[picture], share * guided[picture] * factor + (1 - share) * guided[picture])
    assert torch.equal(ClassifierFree(1.0, rescale=share)(network, SAID, SAID)(x, 0.5), told)


@pytest.mark.parametrize("rescale", [0.0, 0.7])
def test_what_is_said_of_the_variance_is_the_conditional_one(rescale):
    told, null = torch.randn(2, 2, 8, 3, 3, generator=torch.Generator().manual_seed(0))
    x = torch.zeros(2, 4, 3, 3)
    found = ClassifierFree(3.0, rescale=rescale)(lambda x, t, cond: torch.cat((told, null)), SAID, SAID)(x, 0.5)
    alone = ClassifierFree(3.0, rescale=rescale)(lambda x, t, c: torch.cat((told, null))[:, :4], SAID, SAID)(x, 0.5)
    assert torch.equal(found, torch.cat((alone, told[:, 4:]), dim=1))


@pytest.mark.parametrize("scale", [1.0, 7.5])
@pytest.mark.parametrize("image_scale", [1.0, 1.5])
def test_a_picture_to_edit_has_a_scale_of_its_own(scale, image_scale):
    """As StableDiffusionInstructPix2PixPipeline has it (Brooks et al. 2023, equation 3)."""
    text, image = torch.randn(2, 2, 1, 4, 4, generator=torch.Generator().manual_seed(0))
    told = {"context": text, "concat": image}
    null = {name: torch.zeros_like(value) for name, value in told.items()}

    def network(x, t, cond):
        return x + cond["context"] + torch.tanh(cond["concat"] * (2 + cond["context"]))

    x = torch.ones(2, 1, 4, 4)
    found = ClassifierFree(scale, image_scale=image_scale)(network, told, null)(x, 0.5)
    both, picture, nothing = (network(x, 0.5, c) for c in (told, {**null, "concat": image}, null))
    torch.testing.assert_close(found, nothing + scale * (both - picture) + image_scale * (picture - nothing))
    if scale == image_scale == 1:
        assert torch.equal(found, both)
    same = ClassifierFree(scale, image_scale=scale)(network, told, null)(x, 0.5)
    torch.testing.assert_close(same, ClassifierFree(scale)(network, told, null)(x, 0.5))


@pytest.mark.parametrize("told", [(COND, NULL), ({}, {})])
def test_a_scale_of_a_picture_that_is_always_there_is_refused(network, told):
    with pytest.raises(ConfigError, match="sampler.guidance.image_scale needs a picture that training leaves out"):
        ClassifierFree(3.0, image_scale=1.5)(network, *told)


def test_without_a_condition_there_is_nothing_to_guide_by_and_it_costs_half():
    assert stack({}, {}) == {}
    sizes = []
    ClassifierFree(3.0)(lambda x, t, cond: sizes.append(len(x)), {}, {})(X, 0.5)
    assert sizes == [2]


@pytest.mark.parametrize(
    "wrong", [{"interval": (0.6, 0.2)}, {"interval": (0.0, 1.5)}, {"interval": (0.5,)}, {"rescale": 2.0}]
)
def test_what_cannot_be_is_refused_by_its_key(wrong):
    with pytest.raises(ConfigError, match=f"sampler.guidance.{next(iter(wrong))}"):
        ClassifierFree(2.0, **wrong)
