"""Distances of feature sets against torchmetrics on the same features, and against closed forms."""

import numpy as np
import pytest
import torch

from sdtrain.metric.distance import cmmd, fid, inception_score, kid, precision_recall
from sdtrain.metric.moments import FeatureMoments


def features(seed, num):
    return torch.randn(num, 8, generator=torch.Generator().manual_seed(seed)) * 3 + 5


def measured(values):
    moments = FeatureMoments(values.shape[1])
    moments.update(values, torch.arange(len(values)))
    return moments.reduce()


REAL, FAKE = features(1, 90), features(2, 70) * 1.2 + 0.4


def test_fid_is_torchmetrics():
    from torchmetrics.image.fid import _compute_fid

    real, fake = measured(REAL), measured(FAKE)
    theirs = _compute_fid(real.mean, real.covariance, fake.mean, fake.covariance)
    assert fid(real, fake) == pytest.approx(float(theirs), rel=1e-6)
    assert fid(real, fake) == pytest.approx(fid(fake, real), rel=1e-9)


def test_fid_is_scipys():
    linalg = pytest.importorskip("scipy.linalg")
    real, fake = measured(REAL), measured(FAKE)
    root = linalg.sqrtm(real.covariance.numpy() @ fake.covariance.numpy()).real
    traces = real.covariance.trace() + fake.covariance.trace()
    expected = float((real.mean - fake.mean).square().sum() + traces) - 2 * np.trace(root)
    assert fid(real, fake) == pytest.approx(expected, rel=1e-6)


def test_fid_of_fewer_pictures_than_features_is_finite():
    real, fake = measured(REAL[:4]), measured(FAKE[:5])
    assert 0 < fid(real, fake) < 1e4
    assert fid(real, real) == pytest.approx(0, abs=1e-5)


def test_kid_is_torchmetrics_and_seeded():
    from torchmetrics.image.kid import poly_mmd

    whole = kid(REAL[:70], FAKE, num_subsets=1, subset_size=70)  # one subset of all: no draw
    assert whole == (pytest.approx(float(poly_mmd(REAL[:70].double(), FAKE.double())), rel=1e-6), 0.0)
    assert kid(REAL, FAKE, 5, 30, seed=1) == kid(REAL, FAKE, 5, 30, seed=1) != kid(REAL, FAKE, 5, 30, seed=2)
    with pytest.raises(ValueError, match="subsets of 1000"):
        kid(REAL, FAKE)


@pytest.mark.filterwarnings("ignore::UserWarning")  # torchmetrics says what one split is
def test_inception_score_is_torchmetrics():
    from torchmetrics.image.inception import InceptionScore

    logits = torch.randn(100, 12, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    metric = InceptionScore(feature=torch.nn.Identity(), splits=1).double()
    metric.features = [logits]
    assert inception_score(logits, 1)[0] == pytest.approx(float(metric.compute()[0]), rel=1e-6)
    certain = torch.eye(10).repeat(10, 1) * 1000
    assert inception_score(certain) == (pytest.approx(10), pytest.approx(0, abs=1e-9))
    with pytest.raises(ValueError, match="11 splits"):
        inception_score(certain[:10], 11)


def test_cmmd_is_the_formula():
    def kernel(x, y):
        square = np.square(x[:, None] - y[None]).sum(-1)
        return np.exp(-square / 200).mean()

    x, y = REAL.double().numpy(), FAKE.double().numpy()
    expected = 1000 * (kernel(x, x) + kernel(y, y) - 2 * kernel(x, y))
    assert cmmd(REAL, FAKE) == pytest.approx(expected, rel=1e-6)
    assert cmmd(REAL, REAL) == pytest.approx(0, abs=1e-9)


def test_precision_and_recall_are_the_definition():
    def covered(points, manifold):
        radii = [sorted(np.linalg.norm(m - p) for p in manifold)[3] for m in manifold]
        return np.mean([any(np.linalg.norm(m - p) <= r for m, r in zip(manifold, radii)) for p in points])

    x, y = REAL.double().numpy(), FAKE.double().numpy()
    assert precision_recall(REAL, FAKE) == (pytest.approx(covered(y, x)), pytest.approx(covered(x, y)))
    assert precision_recall(REAL, REAL) == (1.0, 1.0)
    assert precision_recall(REAL, FAKE + 1000) == (0.0, 0.0)
    few = torch.cat([REAL[:1]] * 50) + torch.randn(50, 8) * 1e-3  # of one mode: precise, and most is not recalled
    assert precision_recall(REAL, few)[0] > 0.9 > 0.2 > precision_recall(REAL, few)[1]
    with pytest.raises(ValueError, match="no 3 neighbours"):
        precision_recall(REAL[:3], FAKE)
