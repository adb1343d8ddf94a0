"""No condition."""

from sdtrain.conditioner.none import Nothing


def test_it_says_nothing():
    nothing = Nothing()
    assert nothing({"caption": ["a"]}) == nothing.unconditional({"caption": ["a"]}) == {}
    assert (nothing.width, nothing.pooled_width) == (None, None)
