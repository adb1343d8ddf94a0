"""Profiles of averages, and the reconstruction of those that were not kept, against sums over single steps."""

import numpy as np
import pytest

from sdtrain.errors import ConfigError
from sdtrain.optim.averaging import MAX_LENGTH, Power, Snapshot, exponent_of, mix

STEPS = 1000


def profile(snapshot):
    """How much each single step counts in an average as it was updated."""
    kept = np.array([Power(snapshot.length).kept(update) for update in range(1, snapshot.num_updates + 1)])
    weights = (1 - kept) * np.append(np.cumprod(kept[:0:-1])[::-1], 1)
    return np.pad(weights, (0, STEPS - snapshot.num_updates))


def stored(num, lengths=(0.05, 0.10)):
    return [Snapshot(STEPS * (i + 1) // num, length) for i in range(num) for length in lengths]


@pytest.mark.parametrize(("length", "exponent"), [(0.05, 16.97), (0.10, 6.94), (MAX_LENGTH, 0.0)])
def test_exponents_of_the_paper(length, exponent):
    assert exponent_of(length) == pytest.approx(exponent, abs=0.005)


@pytest.mark.parametrize("length", [0.03, 0.05, 0.1, 0.25])
def test_a_length_is_the_standard_deviation_as_a_share_of_training(length):
    weights, times = profile(Snapshot(STEPS, length)), (np.arange(STEPS) + 0.5) / STEPS
    assert weights.sum() == pytest.approx(1)
    mean = weights @ times
    assert np.sqrt(weights @ (times - mean) ** 2) == pytest.approx(length, rel=1e-3)


@pytest.mark.parametrize("length", [0.0, -0.1, 0.3])
def test_a_length_that_no_profile_has_is_refused(length):
    with pytest.raises(ConfigError, match=f"at most 0.289; {length} is not"):
        exponent_of(length)


@pytest.mark.parametrize(
    ("num", "length", "most"),
    [(64, 0.08, 0.0003), (8, 0.06, 0.012), (8, 0.08, 0.012), (1, 0.08, 0.05), (16, 0.15, 0.01)],
)
def test_the_mixture_is_the_average_that_was_not_kept(num, length, most):
    snapshots, wanted = stored(num), Snapshot(STEPS, length)
    factors, missed = mix(snapshots, wanted)
    found, expected = sum(f * profile(s) for f, s in zip(factors, snapshots)), profile(wanted)
    true_miss = np.linalg.norm(found - expected) / np.linalg.norm(expected)
    assert true_miss < most
    assert missed == pytest.approx(true_miss, rel=0.05, abs=1e-5)
    assert found.sum() == pytest.approx(1)  # weights that stand still come out as they are
    worse = [np.linalg.norm(profile(s) - expected) / np.linalg.norm(expected) for s in snapshots[-2:]]
    assert true_miss < 0.5 * min(worse)


def test_what_was_kept_is_taken_as_it_is():
    factors, missed = mix(stored(8), Snapshot(STEPS, 0.10))
    np.testing.assert_allclose(factors, [*[0] * 15, 1], atol=1e-7)
    assert missed < 1e-6


def test_an_average_at_an_earlier_time():
    snapshots = stored(16)
    factors, missed = mix(snapshots, Snapshot(STEPS // 2, 0.08))
    found = sum(f * profile(s) for f, s in zip(factors, snapshots))
    assert np.linalg.norm(found - profile(Snapshot(STEPS // 2, 0.08))) < 0.02 * np.linalg.norm(found)
    assert missed < 0.03


def test_long_runs_and_short_lengths_stay_finite():
    snapshots = [Snapshot(10**6 * (i + 1) // 50, length) for i in range(50) for length in (0.01, 0.05)]
    factors, missed = mix(snapshots, Snapshot(10**6, 0.02))
    assert np.isfinite(factors).all()
    assert factors.sum() == pytest.approx(1)
    assert missed < 0.03
