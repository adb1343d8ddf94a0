"""How long to wait between tries."""

from sdtrain.data.retry import Retry


def test_waits_are_random_below_a_limit_that_doubles():
    found = [list(Retry(6, 1.0, 4.0).waits()) for _ in range(200)]
    for number, limit in enumerate((1, 2, 4, 4, 4)):
        values = [waits[number] for waits in found]
        assert 0 <= min(values) < 0.2 * limit
        assert 0.8 * limit < max(values) <= limit
    assert {len(waits) for waits in found} == {5}


def test_one_try_waits_for_nothing():
    assert list(Retry(1).waits()) == []
