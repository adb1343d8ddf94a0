"""kill -9 anywhere, a corrupt checkpoint, a full disk: the run that goes on equals the one that never stopped."""

import os
import random
import runpy
import signal
import subprocess
import tempfile
from pathlib import Path

import pytest

from sdtrain.checkpoint.commit import newest_valid

toy = runpy.run_path(str(Path(__file__).parent / "toy_run.py"))
fit, fit_in_child, state_hash = toy["fit"], toy["fit_in_child"], toy["state_hash"]


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    return {n: state_hash(fit(tmp_path_factory.mktemp("whole"), accumulate=n)) for n in (1, 3)}


def newest(directory):
    return newest_valid(directory / "toy" / "checkpoints")[0].name


@pytest.mark.parametrize("accumulate", [1, 3])
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_killed_at_any_step_twice(tmp_path, whole, seed, accumulate):
    random.seed(seed)
    for _ in range(2):
        fault = {"signal_number": signal.SIGKILL, "at_batch": random.randint(1, 4 * accumulate)}
        assert fit_in_child(directory=tmp_path, accumulate=accumulate, fault=fault) == -signal.SIGKILL
    assert state_hash(fit(tmp_path, accumulate=accumulate)) == whole[accumulate]


# A save of step 6: torch.save; fsync of optimizer, model, ema, training, COMPLETE, directory; rename; fsync of the
# parent; then the deletion of step 2.
INSIDE = [("save", 1, 4), ("fsync", 1, 4), ("fsync", 4, 4), ("fsync", 5, 4), ("fsync", 6, 4), ("rename", 1, 4)]
AFTER = [("fsync", 7, 6), ("rmtree", 1, 6)]


@pytest.mark.parametrize(("function", "call", "survivor"), INSIDE + AFTER)
def test_killed_inside_a_save(tmp_path, whole, function, call, survivor):
    fault = {"save_step": 6, "function": function, "call": call}
    assert fit_in_child(directory=tmp_path, fault=fault) == -signal.SIGKILL
    assert newest(tmp_path) == f"step_{survivor:08d}"
    assert state_hash(fit(tmp_path, resume="must")) == whole[1]
    names = sorted(path.name for path in (tmp_path / "toy" / "checkpoints").iterdir())
    assert names == ["step_00000006", "step_00000008"]


def cut(file):
    os.truncate(file, 100)


def flip_a_bit(file):
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


def lose(file):
    file.unlink()


FILES = ["model.safetensors", "ema.safetensors", "optimizer_00000.safetensors", "training.pt", "COMPLETE.json"]


@pytest.mark.parametrize("damage", [cut, flip_a_bit, lose])
@pytest.mark.parametrize("name", FILES)
def test_a_corrupt_newest_is_gone_round(tmp_path, whole, name, damage, capsys):
    """The guard: every file is hashed before it is read, and the manifest holds its own hash."""
    fit(tmp_path, max_steps=5)
    damage(tmp_path / "toy" / "checkpoints" / "step_00000005" / name)
    assert state_hash(fit(tmp_path, resume="must")) == whole[1]
    said = capsys.readouterr().out
    assert "skipped checkpoint step_00000005" in said
    assert name in said


def test_a_temporary_directory_that_cannot_be_used_is_not_missed(tmp_path, whole, monkeypatch):
    """The guard: a save is renamed within its directory. Across disks a rename is a copy, which can be half done."""
    monkeypatch.setenv("TMPDIR", str(tmp_path / "nowhere"))
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "nowhere"))
    assert state_hash(fit(tmp_path)) == whole[1]
    assert newest(tmp_path) == "step_00000008"


def test_all_corrupt_and_must_ends_with_3(tmp_path):
    fit(tmp_path, max_steps=4)
    for path in (tmp_path / "toy" / "checkpoints").iterdir():
        os.truncate(path / "training.pt", 100)
    assert fit_in_child(directory=tmp_path, resume="must") == 3


def test_a_disk_that_fills_up_keeps_what_was_saved(tmp_path, whole):
    disk = tmp_path / "toy" / "checkpoints"
    disk.mkdir(parents=True)
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=80k", "tmpfs", disk], capture_output=True)
    if mounted.returncode:
        pytest.skip(f"no tmpfs can be mounted here: {mounted.stderr.decode().strip()}")
    try:
        (disk / "filler").write_bytes(bytes(40_000))
        assert fit_in_child(directory=tmp_path, keep_last=9) == 2
        assert sorted(path.name for path in disk.iterdir()) == ["filler", "step_00000002", "step_00000004"]
        assert newest(tmp_path) == "step_00000004"
        (disk / "filler").unlink()
        assert state_hash(fit(tmp_path, resume="must", every_steps=8)) == whole[1]
    finally:
        subprocess.run(["umount", "--lazy", disk], check=True)


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root, to become another user")
def test_an_unwritable_directory_fails_at_the_first_save(tmp_path):
    stage = tmp_path / "toy"
    stage.mkdir()
    for path in (stage, *stage.parents[:3]):
        path.chmod(0o755)
    if (pid := os.fork()) == 0:
        os.setuid(65534)
        os._exit(fit_in_child(directory=tmp_path))
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 2
