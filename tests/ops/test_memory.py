"""The peak is this program's own, and grows by what it takes."""

import subprocess
import sys

CODE = """
from sdtrain.ops.memory import peak_memory_bytes
before = peak_memory_bytes()
held = b"x" * (100 << 20)
del held
print(before, peak_memory_bytes() - before)
"""


def test_the_peak_of_a_parent_is_not_the_childs():
    """Guard: `VmHWM`; `ru_maxrss` starts with what this process, the parent, holds."""
    held = b"x" * (600 << 20)
    done = subprocess.run([sys.executable, "-c", CODE], capture_output=True, text=True, check=True)
    assert len(held)
    before, grown = map(int, done.stdout.split())
    assert before < 200 << 20
    assert 90 << 20 < grown < 120 << 20
