"""Many faults in one run: the state that it ends with is that of the run that met none.

The guards are all of test_kill.py's and test_stop.py's at once. SDTRAIN_SOAK_STEPS and SDTRAIN_SOAK_FAULTS make it
longer.
"""

import os
import random
import runpy
import shutil
import signal
import time
from pathlib import Path

import pytest

from sdtrain.checkpoint.commit import newest_valid, read_manifest

toy = runpy.run_path(str(Path(__file__).parent / "toy_run.py"))
fit, fit_in_child, state_hash = toy["fit"], toy["fit_in_child"], toy["state_hash"]
NUM_STEPS = int(os.environ.get("SDTRAIN_SOAK_STEPS", 300))
NUM_FAULTS = int(os.environ.get("SDTRAIN_SOAK_FAULTS", 15))
EVERY_STEPS, ACCUMULATE = 5, 2
OPTIONS = {"max_steps": NUM_STEPS, "every_steps": EVERY_STEPS, "accumulate": ACCUMULATE}


def newest_step(directory):
    path, _ = newest_valid(directory / "toy" / "checkpoints")
    return read_manifest(path)["step"] if path else 0


def spoil(directory, chosen):
    """One byte of the newest checkpoint."""
    path, _ = newest_valid(directory / "toy" / "checkpoints")
    if path is not None:
        file = chosen.choice(sorted(path.iterdir()))
        content = bytearray(file.read_bytes())
        content[chosen.randrange(len(content))] ^= 1 << chosen.randrange(8)
        file.write_bytes(content)


def random_fault(chosen, start, num_left):
    """In about the middle of what is left for each fault: a kill in a step or in a save, or a signal to stop."""
    steps = chosen.randint(1, max(1, 2 * (NUM_STEPS - start) // (num_left + 1)))
    kind = chosen.choice(["kill", "kill in a save", "stop"])
    if kind == "kill in a save":
        step = (start + steps) // EVERY_STEPS * EVERY_STEPS + EVERY_STEPS
        function, most = chosen.choice([("save", 1), ("fsync", 6), ("rename", 1)])
        return -signal.SIGKILL, {"save_step": step, "function": function, "call": chosen.randint(1, most)}
    number = signal.SIGKILL if kind == "kill" else chosen.choice([signal.SIGTERM, signal.SIGUSR1])
    code = -signal.SIGKILL if kind == "kill" else 75
    return code, {"signal_number": number, "at_batch": chosen.randint(1, steps * ACCUMULATE)}


@pytest.mark.slow
@pytest.mark.parametrize("seed", [0])
def test_a_run_of_many_faults_ends_as_the_clean_one(tmp_path, seed, capsys):
    whole = state_hash(fit(tmp_path / "whole", **OPTIONS))
    shutil.rmtree(tmp_path / "whole")
    chosen, began, num_faults, lost = random.Random(seed), time.monotonic(), 0, 0
    while num_faults < NUM_FAULTS:
        start = newest_step(tmp_path)
        code, fault = random_fault(chosen, start, NUM_FAULTS - num_faults)
        ended = fit_in_child(directory=tmp_path, fault=fault, **OPTIONS)
        assert ended in (code, 0), fault
        num_faults += 1
        if ended == 0:
            break
        reached = start + fault.get("at_batch", 0) // ACCUMULATE if "at_batch" in fault else fault["save_step"]
        if chosen.random() < 0.3:
            spoil(tmp_path, chosen)
        lost += max(reached - newest_step(tmp_path), 0)
    assert num_faults >= min(NUM_FAULTS, 10)
    assert state_hash(fit(tmp_path, **OPTIONS)) == whole
    assert lost <= num_faults * 2 * EVERY_STEPS  # a spoiled checkpoint costs another interval
    with capsys.disabled():
        goodput = NUM_STEPS / (NUM_STEPS + lost)
        print(
            f"\nsoak: {num_faults} faults in {NUM_STEPS} steps, {lost} steps done twice, goodput {goodput:.1%}, "
            f"{time.monotonic() - began:.0f} s"
        )
