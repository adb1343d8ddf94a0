"""Denormals are 0 on every thread of a run, for a run says so before its first parallel operation."""

import subprocess
import sys

import pytest
import torch

CODE = """
import torch
from sdtrain.ops.denormal import flush_denormals
torch.set_num_threads(4)
if {is_told}: flush_denormals()
tiny = torch.full((1 << 20,), 1e-30) * 1e-9  # a parallel operation: four threads' shares
print(int(tiny.count_nonzero()))
"""


@pytest.mark.skipif(not torch.set_flush_denormal(False), reason="this CPU has no such switch")
@pytest.mark.parametrize(("is_told", "num_left"), [(True, 0), (False, 1 << 20)])
def test_every_thread_flushes(is_told, num_left):
    """Guard: the call itself; made after the threads are there it reaches one of them."""
    code = CODE.format(is_told=is_told)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert int(done.stdout) == num_left
