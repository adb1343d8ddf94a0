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
    figures = memorisation(pictures(2, 200), pictures(3, 200), [training])
    assert figures["ratio"] == pytest.approx(1, abs=0.2)
    assert figures["closer"] < 0.15


def test_copies_are_found(training):
    rng = np.random.default_rng(0)
    noise = rng.integers(-3, 4, (50, 64, 64, 3))
    copies = (training[100:150].astype(int) + noise).clip(0, 255).astype(np.uint8)
    held_out = pictures(3, 150)
    assert memorisation(copies, held_out, [training])["ratio"] < 0.2
    planted = np.concatenate([copies, pictures(2, 150)])
    assert memorisation(planted, held_out, [training])["closer"] == pytest.approx(0.25 + 0.75 * 0.05, abs=0.06)


def test_the_distance_is_rms_over_pixels_to_the_nearest(training):
    samples, held_out = pictures(2, 9), pictures(3, 9)

    for among in (training, training[:20]):  # 20 are fewer than the candidates
        medians = [
            np.median([np.sqrt(((among - image.astype(np.float32)) ** 2).mean((1, 2, 3))).min() for image in images])
            for images in (samples, held_out)
        ]
        figures = memorisation(samples, held_out, [among])
        assert [figures["sample"], figures["held_out"]] == pytest.approx(medians, rel=1e-4)
        assert figures["ratio"] == pytest.approx(medians[0] / medians[1], rel=1e-4)


def test_parts_find_what_the_whole_finds_and_only_the_nearest_of_each_are_compared(training, monkeypatch):
    from sdtrain.metric import memorisation as module

    samples, held_out = pictures(2, 9), pictures(3, 9)
    whole = memorisation(samples, held_out, [training])
    assert memorisation(samples, held_out, [training[1000:], training[:1000]]) == whole
    wide = training[:40, :, :50]  # blocks of 3 pixels do not fill 50
    assert memorisation(wide[3:6], wide[:2], iter([wide]))["sample"] == 0
    compared = []
    monkeypatch.setattr(module, "NUM_CANDIDATES", 4)
    nearest = module.Nearest(samples)
    monkeypatch.setattr(module.np, "square", lambda x, square=np.square: compared.append(len(x)) or square(x))
    nearest.update(training[:100])
    nearest.update(samples)
    nearest.update(training)
    assert compared[:9] == [4] * 9
    assert not nearest.distances.any()
    assert compared[18:] == [0] * 9  # nothing can be nearer


def test_ranks_that_have_different_parts_find_the_same(training, monkeypatch):
    """Two real ones do in the test of tools/evaluate.py."""
    from sdtrain.metric import memorisation as module

    samples, held_out = pictures(2, 9), pictures(3, 9)
    whole = memorisation(samples, held_out, [training[:500], training[500:1000], training[1000:]])
    other = module.Nearest(np.concatenate([samples, held_out]))
    other.update(training[500:1000])

    def gather(found, own):
        found[:] = own, other.distances

    monkeypatch.setattr(module.dist, "is_initialized", lambda: True)
    monkeypatch.setattr(module.dist, "get_world_size", lambda: 2)
    monkeypatch.setattr(module.dist, "all_gather_object", gather)
    assert memorisation(samples, held_out, [training[:500], training[1000:]]) == whole
