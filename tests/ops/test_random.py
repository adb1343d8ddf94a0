"""The generator against the paper's known answers, and what DESIGN section 3 promises of it."""

import math

import pytest
import torch

from sdtrain.ops.random import Draw, philox

ONES = 0xFFFFFFFF
KNOWN_ANSWERS = [  # Random123 1.14, tests/kat_vectors, philox4x32 with 10 rounds: counter, key, words
    ((0, 0, 0, 0), (0, 0), "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
    ((ONES, ONES, ONES, ONES), (ONES, ONES), "408f276d 41c83b0e a20bc7c6 6d5451fd"),
    (
        (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
        (0xA4093822, 0x299F31D0),
        "d16cfe09 94fdcceb 5001e420 24126ea1",
    ),
]

GOLDEN = [
    [1963697961, 2162421459, 24045288, 2768345257, 3404746673],
    [3415777335, 1153226031, 2717570399, 2625386088, 3197387274],
    [3528468030, 211307995, 1819041880, 2603768601, 541515282],
]


def draw_of(ids, epoch=0, seed=7):
    ids = torch.tensor(ids)
    return Draw(seed, ids, torch.full_like(ids, epoch))


@pytest.mark.parametrize(("counter", "key", "words"), KNOWN_ANSWERS)
def test_philox_gives_the_known_answers(counter, key, words):
    found = philox(tuple(torch.tensor([word]) for word in counter), key)
    assert [f"{word:08x}" for word in found[0].tolist()] == words.split()


def test_the_words_of_a_draw_stay_what_they_are():
    """A change here is another run for everybody: the same seed would no longer give the same noise."""
    words = draw_of([0, 1, 2**40]).bits("noise", (5,))
    assert words.tolist() == GOLDEN


def test_a_samples_numbers_do_not_depend_on_its_batch():
    ids = [5, 2**33 + 5, 0, 17]
    together = draw_of(ids)
    for i, number in enumerate(ids):
        alone = draw_of([number])
        for kind in ("bits", "uniform", "normal"):
            whole, single = (getattr(draw, kind)("noise", (3, 5, 7)) for draw in (together, alone))
            assert torch.equal(whole[i], single[0])


@pytest.mark.parametrize(
    "other", [draw_of([5], seed=8), draw_of([6]), draw_of([5 + 2**32]), draw_of([5], epoch=1), draw_of([5])]
)
def test_seed_sample_epoch_and_purpose_each_change_every_word(other):
    purpose = "posterior" if other == draw_of([5]) else "noise"
    assert not (draw_of([5]).bits("noise", (64,)) == other.bits(purpose, (64,))).any()


def test_the_batch_comes_first_in_every_shape():
    draw = draw_of([3, 4])
    assert draw.uniform("u").shape == (2,)
    assert draw.normal("n").shape == (2,)
    assert draw.normal("n", (3, 5)).shape == (2, 3, 5)
    assert torch.equal(draw.bits("b", (2, 4)).flatten(1), draw.bits("b", (8,)))


def test_normals_have_the_moments_of_a_normal():
    num = 2**19
    z = Draw.of(0, 512).normal("noise", (4, 16, 16)).double().flatten()
    assert z.numel() == num
    five_errors = 5 / math.sqrt(num)
    assert abs(z.mean()) < five_errors
    assert abs(z.square().mean() - 1) < five_errors * math.sqrt(2)
    assert abs(z.pow(3).mean()) < five_errors * math.sqrt(15)
    assert abs(z.pow(4).mean() - 3) < five_errors * math.sqrt(96)
    for quantile, share in ((-1.0, 0.158655), (0.5, 0.691462), (3.0, 0.998650)):
        assert abs((z < quantile).double().mean() - share) < five_errors * math.sqrt(share * (1 - share))


def test_normals_are_box_and_mullers():
    draw = draw_of([0, 9])
    u, v = draw.uniform("noise", (2, 8)).double().unbind(1)
    pair = torch.polar((-2 * u.log()).sqrt(), 2 * math.pi * v)
    expected = torch.cat((pair.real, pair.imag), 1)[:, :15].float()
    torch.testing.assert_close(draw.normal("noise", (15,)), expected, rtol=1e-5, atol=1e-6)


def test_uniforms_fill_their_interval_evenly():
    u = Draw.of(0, 512).uniform("u", (1024,)).flatten()
    counts = torch.histc(u, 64, 0, 1).double()
    chi_squared = float(((counts - u.numel() / 64).square() / (u.numel() / 64)).sum())
    assert chi_squared < 63 + 5 * math.sqrt(2 * 63)


def test_uniforms_keep_off_both_ends(monkeypatch):
    extremes = torch.tensor([[0, ONES, 0xFFFFFF00, 0x7FFFFFFF]])
    monkeypatch.setattr(Draw, "bits", lambda self, purpose, shape: extremes.view(1, *shape))
    u = draw_of([0]).uniform("u", (4,))
    assert 0 < float(u.min()) < 1e-7
    assert 1 - 1e-6 < float(u.max()) < 1
    assert draw_of([0]).normal("u", (4,)).isfinite().all()


def test_purposes_epochs_and_samples_are_independent():
    num = 2**17
    reference = Draw.of(0, 128).normal("noise", (1024,)).flatten()
    others = {
        "purpose": Draw.of(0, 128).normal("posterior", (1024,)),
        "seed": Draw.of(1, 128).normal("noise", (1024,)),
        "epoch": Draw(0, torch.arange(128), torch.ones(128, dtype=torch.int64)).normal("noise", (1024,)),
        "sample": Draw(0, torch.arange(1, 129), torch.zeros(128, dtype=torch.int64)).normal("noise", (1024,)),
        "position": reference.view(128, 1024).roll(1, dims=1),
    }
    for name, other in others.items():
        correlation = float((reference * other.flatten()).mean())
        assert abs(correlation) < 5 / math.sqrt(num), name
