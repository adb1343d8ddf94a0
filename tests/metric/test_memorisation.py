"""The memorisation check: it finds planted copies, and finds none where there are none."""

import numpy as np
import pytest

from sdtrain.data import scene as shapes
from sdtrain.metric.memorisation import memorisation


def pictures(seed, count):
    return shapes.render([scene for scene, _ in shapes.scenes("mixed", seed, count)])


@pytest.fixture(scope="module")
def training():
    return pictures(1, 1500)


def test_fresh_pictures_are_as_far_as_held_out_ones(training):
    figures = memorisation(pictures(2, 200), pictures(3, 200), training)
    assert figures["ratio"] == pytest.approx(1, abs=0.2)
    assert figures["closer"] < 0.15


def test_copies_are_found(training):
    rng = np.random.default_rng(0)
    noise = rng.integers(-3, 4, (50, 64, 64, 3))
    copies = (training[100:150].astype(int) + noise).clip(0, 255).astype(np.uint8)
    held_out = pictures(3, 150)
    assert memorisation(copies, held_out, training)["ratio"] < 0.2
    planted = np.concatenate([copies, pictures(2, 150)])
    assert memorisation(planted, held_out, training)["closer"] == pytest.approx(0.25 + 0.75 * 0.05, abs=0.06)


def test_the_distance_is_rms_over_pixels_to_the_nearest(training):
    samples, held_out = pictures(2, 9), pictures(3, 9)

    for among in (training, training[:20]):  # 20 are fewer than the candidates
        medians = [
            np.median([np.sqrt(((among - image.astype(np.float32)) ** 2).mean((1, 2, 3))).min() for image in images])
            for images in (samples, held_out)
        ]
        figures = memorisation(samples, held_out, among)
        assert [figures["sample"], figures["held_out"]] == pytest.approx(medians, rel=1e-4)
        assert figures["ratio"] == pytest.approx(medians[0] / medians[1], rel=1e-4)
