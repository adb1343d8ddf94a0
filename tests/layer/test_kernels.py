"""The CPU kernels: torch's numbers in double precision, forward and backward, and torch's way where they are not."""

import os
import subprocess
import sys

import pytest
import torch
from torch.nn import functional as F

from sdtrain.layer import kernels

SHAPES = [((3, 16, 5, 6), 4), ((2, 24, 8, 8), 24), ((1, 6, 1, 1), 3), ((5, 96, 4, 4), 2)]


def plain_group_norm(x, groups, weight, bias, eps, silu):
    y = F.group_norm(x, groups, weight, bias, eps)
    return F.silu(y) if silu else y


def plain_geglu(x):
    value, gate = x.chunk(2, dim=-1)
    return value * F.gelu(gate)


def gradients(y, inputs, direction):
    return [y.detach().double(), *(g.double() for g in torch.autograd.grad(y, inputs, direction.to(y.dtype)))]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("silu", [True, False])
@pytest.mark.parametrize(("shape", "groups"), SHAPES)
def test_group_norm_is_torchs(shape, groups, silu, dtype):
    """A mean of 30: the second look at x, without which 1e-5 is out of reach."""
    torch.manual_seed(0)
    x = (torch.randn(shape) * 2 + 30).to(dtype).contiguous(memory_format=torch.channels_last).requires_grad_()
    weight, bias = torch.randn(shape[1], requires_grad=True), torch.randn(shape[1], requires_grad=True)
    direction = torch.randn(shape).to(dtype)
    y = kernels.group_norm(x, groups, weight, bias, 1e-5, silu)
    assert "_GroupNorm" in type(y.grad_fn).__name__
    assert y.dtype == dtype
    assert y.is_contiguous(memory_format=torch.channels_last)
    exact = [part.detach().double().requires_grad_() for part in (x, weight, bias)]
    theirs = plain_group_norm(exact[0], groups, *exact[1:], 1e-5, silu)
    tolerance = 1e-5 if dtype == torch.float32 else 8e-3
    for found, wanted in zip(gradients(y, (x, weight, bias), direction), gradients(theirs, exact, direction)):
        assert (found - wanted).abs().max() <= tolerance * wanted.abs().max().clamp(min=1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_geglu_is_torchs(dtype):
    torch.manual_seed(0)
    x = (torch.randn(2, 7, 2 * 33) * 4).to(dtype).requires_grad_()
    direction = torch.randn(2, 7, 33).to(dtype)
    y = kernels.geglu(x)
    assert "_GEGLU" in type(y.grad_fn).__name__
    assert y.dtype == dtype
    exact = x.detach().double().requires_grad_()
    tolerance = 1e-6 if dtype == torch.float32 else 8e-3
    for found, wanted in zip(gradients(y, x, direction), gradients(plain_geglu(exact), exact, direction)):
        assert (found - wanted).abs().max() <= tolerance * wanted.abs().max()


def test_far_values_are_torchs():
    """Where the exponential leaves float32, and what is no number: it goes on to the loss, where the guard sees it."""
    x = torch.tensor([-1e30, -200.0, -88.0, -1.0, 0.0, 1.0, 88.0, 200.0, 1e30, float("nan")])
    ones = torch.ones_like(x)
    torch.testing.assert_close(kernels.geglu(torch.cat((ones, x))), F.gelu(x), equal_nan=True)
    for dtype in (torch.float32, torch.bfloat16):
        maps = torch.zeros(2, 4, 3, 3, dtype=dtype).contiguous(memory_format=torch.channels_last)
        maps[1, 2, 1, 1] = float("nan")
        y = kernels.group_norm(maps, 2, torch.ones(4), torch.full((4,), -100.0), 1e-5, silu=True)
        torch.testing.assert_close(y[0], torch.full_like(y[0], 0.0), atol=1e-20, rtol=0)
        assert y[1, 2:].isnan().all()
        assert not y[1, :2].isnan().any()


@pytest.mark.parametrize("function", ["group_norm", "geglu"])
def test_under_autocast_the_answer_is_in_its_dtype(function):
    x = torch.randn(2, 8, 4, 4, requires_grad=True)
    call = {
        "group_norm": lambda: kernels.group_norm(x, 2, torch.ones(8), torch.zeros(8), 1e-5, silu=True),
        "geglu": lambda: kernels.geglu(x),
    }[function]
    with torch.autocast("cpu", torch.bfloat16):
        y = call()
    assert y.dtype == torch.bfloat16
    torch.testing.assert_close(y.float(), call(), rtol=8e-3, atol=1e-2)
    y.float().sum().backward()
    assert x.grad.dtype == torch.float32


def test_bfloat16_is_the_nearest():
    """And what is no number stays none, whatever its bits."""
    torch.manual_seed(0)
    x = torch.randn(64, 128)
    with torch.autocast("cpu", torch.bfloat16):
        found = kernels.geglu(x)
    assert (found == kernels.geglu(x).bfloat16()).all()
    x[0, 0] = torch.tensor(0x7FFFFFFF, dtype=torch.int32).view(torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        assert kernels.geglu(x)[0, 0].isnan()


def test_a_sample_does_not_see_its_batch():
    """Bit by bit, in both ways: what one rank or four make of it is the same."""
    torch.manual_seed(0)
    x = torch.randn(6, 12, 5, 5).bfloat16().contiguous(memory_format=torch.channels_last)
    weight, bias = torch.randn(12), torch.randn(12)

    def both(part):
        part = part.clone(memory_format=torch.channels_last).requires_grad_()
        y = kernels.group_norm(part, 3, weight, bias, 1e-5, silu=True)
        return y.detach(), torch.autograd.grad(y, part, y.detach())[0]

    whole, rows = both(x), [both(x[i : i + 1]) for i in range(6)]
    for i in range(2):
        assert torch.equal(whole[i], torch.cat([row[i] for row in rows]))


def test_other_precisions_and_compiled_code_take_torchs_way():
    weight, bias = torch.ones(4), torch.zeros(4)
    x = torch.randn(2, 4, 3, 3, dtype=torch.float64, requires_grad=True)
    y = kernels.group_norm(x, 2, weight.double(), bias.double(), 1e-5, silu=True)
    torch.testing.assert_close(
        y.double(), plain_group_norm(x, 2, weight.double(), bias.double(), 1e-5, True), rtol=1e-5, atol=1e-6
    )
    found = kernels.group_norm(x.bfloat16(), 2, weight.bfloat16(), bias.bfloat16(), 1e-5, silu=False)
    torch.testing.assert_close(found, plain_group_norm(x.bfloat16().float(), 2, weight, bias, 1e-5, False).bfloat16())
    compiled = torch.compile(kernels.geglu, backend="eager", fullgraph=True)
    z = torch.randn(2, 8)
    torch.testing.assert_close(compiled(z), plain_geglu(z))


CODE = """
import torch
from sdtrain.layer import kernels
x = torch.randn(2, 8, 3, 3)
y = kernels.group_norm(x, 2, torch.ones(8), torch.zeros(8), 1e-5, True)
torch.testing.assert_close(y, torch.nn.functional.silu(torch.nn.functional.group_norm(x, 2)))
print(kernels.library() is not None)
"""


def run(**environment):
    done = subprocess.run(
        [sys.executable, "-c", CODE], env={**os.environ, **environment}, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip() == "True"


@pytest.mark.slow
def test_no_compiler_is_torchs_way(tmp_path):
    """None on the path; one that fails; a home that cannot be written."""
    assert not run(PATH=str(tmp_path), XDG_CACHE_HOME=str(tmp_path / "cache"))
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "gcc").write_text("#!/bin/sh\n[ $1 = --version ] || exit 1\n")
    (tmp_path / "bin" / "gcc").chmod(0o755)
    assert not run(PATH=f"{tmp_path / 'bin'}:/bin:/usr/bin", XDG_CACHE_HOME=str(tmp_path / "cache"))
    assert list((tmp_path / "cache" / "sdtrain").iterdir()) == []
    (tmp_path / "file").touch()
    assert not run(XDG_CACHE_HOME=str(tmp_path / "file"))


@pytest.mark.slow
@pytest.mark.skipif(kernels.library() is None, reason="no C compiler here")
def test_it_is_built_once(tmp_path):
    assert run(XDG_CACHE_HOME=str(tmp_path))
    (built,) = tmp_path.joinpath("sdtrain").iterdir()
    made = built.stat().st_mtime_ns
    assert run(XDG_CACHE_HOME=str(tmp_path))
    assert [path.stat().st_mtime_ns for path in tmp_path.joinpath("sdtrain").iterdir()] == [made]
