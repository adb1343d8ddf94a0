"""The measurements whose figures the documents quote still run, in their smallest form: ours and every peer."""

import subprocess
import sys
from pathlib import Path

import pytest

FOLDER = Path(__file__).parents[2] / "tools" / "bench"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("command", "last"),
    [
        ("checkpoint.py --gigabytes 0.01", "a resume takes "),
        ("data.py --rounds 1 --samples 128", "with two"),
        ("ema.py --rounds 1 --width 8", "of that of a copy"),
        ("step.py --rounds 1 --steps 80", "a step"),
        ("unet.py --rounds 1 --model tiny --size 8 --batch 1", "peak memory"),
        ("vae.py --rounds 1 --size 32 --batch 1", "of the matmul peak"),
    ],
)
def test_it_measures_to_the_end(command, last):
    ended = subprocess.run([sys.executable, *f"{FOLDER}/{command}".split()], capture_output=True, text=True)
    assert ended.returncode == 0, ended.stderr
    assert last in ended.stdout.splitlines()[-1]
