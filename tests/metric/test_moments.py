"""Mean, covariance and kept features: exact, and the same on any number of ranks."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from sdtrain.errors import ConfigError
from sdtrain.metric.distance import fid, kid
from sdtrain.metric.moments import FeatureMoments, Moments

ROOT = Path(__file__).parents[2]
NUM, WIDTH = 103, 8  # a prime: no number of ranks divides it


def features(seed=0, num=NUM):
    return torch.randn(num, WIDTH, generator=torch.Generator().manual_seed(seed)) * 3 + 5


def measured(values, ids=None, batch=16, num_kept=40):
    moments = FeatureMoments(values.shape[1], num_kept)
    ids = torch.arange(len(values)) if ids is None else ids
    for part, names in zip(values.split(batch), ids.split(batch)):
        moments.update(part, names)
    return moments.reduce()


def test_they_are_numpys():
    values = features()
    found = measured(values)
    assert found.num_images == NUM
    np.testing.assert_allclose(found.mean, values.double().numpy().mean(0), rtol=1e-12)
    np.testing.assert_allclose(found.covariance, np.cov(values.double().numpy(), rowvar=False), rtol=1e-9, atol=1e-12)


def test_kept_features_depend_on_the_ids_alone():
    values, order = features(), torch.randperm(NUM, generator=torch.Generator().manual_seed(1))
    one, other = measured(values), measured(values[order], order, batch=7)
    assert one.kept.shape == (40, WIDTH)
    assert torch.equal(one.kept, other.kept)
    assert not torch.equal(one.kept, values[:40])
    assert torch.equal(measured(values, num_kept=1000).kept.sum(0).round(), values.sum(0).round())


def test_the_hash_mixes():
    from sdtrain.metric.moments import _hash

    order = _hash(torch.arange(100_000))
    assert len(order.unique()) == 100_000
    first = order.argsort()[:10_000].double()
    assert abs(first.mean() / 50_000 - 1) < 0.03  # the kept are from everywhere


def test_what_is_not_finite_or_too_few_is_refused():
    moments = FeatureMoments(WIDTH)
    with pytest.raises(ValueError, match="not finite"):
        moments.update(torch.full((1, WIDTH), torch.nan), torch.zeros(1))
    with pytest.raises(ValueError, match="at least 2 samples"):
        moments.reduce()


def test_stored_moments_come_back_and_know_their_network(tmp_path):
    found = measured(features())
    digest = found.save(tmp_path / "m.safetensors", "network-a")
    back, same = Moments.load(tmp_path / "m.safetensors", "network-a")
    assert (back.num_images, same) == (NUM, digest)
    assert fid(found, back) == pytest.approx(0, abs=1e-9)
    with pytest.raises(ConfigError, match="made with features network-a, not network-b"):
        Moments.load(tmp_path / "m.safetensors", "network-b")
    (tmp_path / "x").write_text("none")
    for name in ("x", "absent"):
        with pytest.raises(ConfigError, match="holds no stored moments"):
            Moments.load(tmp_path / name, "network-a")


RANK = """
import sys, torch, torch.distributed as dist
sys.path.insert(0, sys.argv[4])
from test_moments import features
from sdtrain.metric.moments import FeatureMoments
rank, world = int(sys.argv[1]), int(sys.argv[2])
dist.init_process_group("gloo", init_method="file://" + sys.argv[3] + "/meet", rank=rank, world_size=world)
moments = FeatureMoments(8, 40)
ids = torch.arange(103)[rank::world]
for part in ids.split(16):
    moments.update(features()[part], part)
found = moments.reduce()
torch.save(list(found), f"{sys.argv[3]}/{rank}.pt")
dist.destroy_process_group()
"""


@pytest.mark.slow
@pytest.mark.parametrize("world", [1, 2, 4])
def test_any_number_of_ranks_finds_the_same(world, tmp_path):
    commands = [
        [sys.executable, "-c", RANK, str(r), str(world), str(tmp_path), str(Path(__file__).parent)]
        for r in range(world)
    ]
    ranks = [subprocess.Popen(c, env={"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}) for c in commands]
    try:
        assert [rank.wait(timeout=120) for rank in ranks] == [0] * world
    finally:
        for rank in ranks:
            rank.kill()
    alone, reference = measured(features()), measured(features(7, 60) + 0.3)
    for number in range(world):
        found = Moments(*torch.load(tmp_path / f"{number}.pt", weights_only=True))
        assert found.num_images == NUM
        assert torch.equal(found.kept, alone.kept)
        assert fid(found, reference) == pytest.approx(fid(alone, reference), rel=1e-9)
        assert kid(found.kept, reference.kept, 3, 20) == kid(alone.kept, reference.kept, 3, 20)
