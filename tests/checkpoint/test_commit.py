"""A checkpoint is whole or it is none, whatever happens to it or to the disk."""

import json
import os
import shutil
import subprocess
import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial

import pytest
import torch
from safetensors.torch import save_file

from sdtrain.checkpoint import commit as commit_file
from sdtrain.checkpoint.commit import (
    commit,
    find_resume,
    manifest_hash,
    newest_valid,
    prune,
    read_manifest,
    verify,
    verify_once,
)
from sdtrain.errors import ConfigError, RunError


def save(directory, step, line=(), needed_bytes=100, score=None):
    def write(path):
        (path / "a.bin").write_bytes(bytes([step]) * 100)
        (path / "deep").mkdir()
        (path / "deep" / "b.bin").write_bytes(b"b" * step)
        return [path / "a.bin", path / "deep" / "b.bin"]

    meta = {"step": step, "images": 4 * step, "line": list(line), "score": score}
    return commit(directory / f"step_{step:08d}", write, meta, needed_bytes)


def save_line(directory, *steps):
    line = []
    for step in steps:
        path = save(directory, step, line)
        line.append(manifest_hash(path))
    return path


def names(directory):
    return sorted(path.name for path in directory.iterdir())


def test_commit_lists_every_file_and_what_it_was_told(tmp_path):
    path = save(tmp_path, 7)
    verify(path)
    manifest = read_manifest(path)
    assert manifest["step"] == 7
    assert manifest["images"] == 28
    assert {name: entry["bytes"] for name, entry in manifest["files"].items()} == {"a.bin": 100, "deep/b.bin": 7}
    assert names(tmp_path) == ["step_00000007"]


def truncate(path):
    os.truncate(path / "a.bin", 60)


def flip_a_bit(path):
    content = bytearray((path / "a.bin").read_bytes())
    content[50] ^= 1
    (path / "a.bin").write_bytes(content)


def delete_a_file(path):
    (path / "deep" / "b.bin").unlink()


def swap_in_a_directory(path):
    (path / "a.bin").unlink()
    (path / "a.bin").mkdir()


def delete_manifest(path):
    (path / "COMPLETE.json").unlink()


def alter_manifest(path):
    text = (path / "COMPLETE.json").read_text()
    (path / "COMPLETE.json").write_text(text.replace('"step": 20', '"step": 21'))


def truncate_manifest(path):
    os.truncate(path / "COMPLETE.json", 40)


def empty_manifest(path):
    (path / "COMPLETE.json").write_text("[]")


FAULTS = {
    truncate: "a.bin has 60 bytes, 100 were written",
    flip_a_bit: "a.bin is not what was written: its sha256 differs",
    delete_a_file: "deep/b.bin cannot be read: No such file",
    swap_in_a_directory: "a.bin has ",
    delete_manifest: "COMPLETE.json cannot be read: ",
    alter_manifest: "COMPLETE.json was altered",
    truncate_manifest: "COMPLETE.json cannot be read: ",
    empty_manifest: "COMPLETE.json was altered",
}


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.__name__)
def test_a_corrupt_newest_falls_back_and_says_why(tmp_path, fault, capsys):
    save_line(tmp_path, 3, 10, 20)
    fault(tmp_path / "step_00000020")
    with pytest.raises(RunError, match="step_00000020") as raised:
        verify(tmp_path / "step_00000020")
    assert raised.value.exit_code == 3
    path, skipped = newest_valid(tmp_path)
    assert path == tmp_path / "step_00000010"
    assert [skipped_path.name for skipped_path, _ in skipped] == ["step_00000020"]
    assert FAULTS[fault] in skipped[0][1]
    assert find_resume(tmp_path, "auto") == path
    assert FAULTS[fault] in capsys.readouterr().out


def test_resume_words(tmp_path, capsys):
    assert find_resume(tmp_path / "absent", "auto") is None
    assert capsys.readouterr().out == ""
    with pytest.raises(RunError, match="resume=must") as raised:
        find_resume(tmp_path / "absent", "must")
    assert raised.value.exit_code == 3
    path = save_line(tmp_path, 1, 2)
    assert find_resume(tmp_path, "must") == path
    assert find_resume(tmp_path, "never") is None
    for path in tmp_path.iterdir():
        flip_a_bit(path)
    with pytest.raises(RunError, match="2 skipped") as raised:
        find_resume(tmp_path, "must")
    assert raised.value.exit_code == 3
    assert find_resume(tmp_path, "auto") is None
    assert "from the beginning" in capsys.readouterr().out
    with pytest.raises(ConfigError, match="resume=perhaps"):
        find_resume(tmp_path, "perhaps")


def test_one_rank_verifies_and_the_others_are_told(tmp_path, monkeypatch):
    """The guard: each byte is read once to be hashed, not once on every rank; what is loaded is what was verified."""
    path, told, hashed = save_line(tmp_path, 1, 2), [], []
    original = commit_file._sha256
    monkeypatch.setattr(commit_file, "_sha256", lambda file: hashed.append(file.name) or original(file))
    assert find_resume(tmp_path, "auto", broadcast=lambda own: told.append(own) or own) == path
    verify_once(path)
    assert [hashed.count(name) for name in ("a.bin", "b.bin")] == [1, 1]
    hashed.clear()
    assert find_resume(tmp_path, "auto", rank=1, broadcast=lambda _: told[0]) == path
    verify_once(path)
    assert set(hashed) == {"COMPLETE.json"}
    with pytest.raises(RunError, match="2 skipped") as raised:
        find_resume(tmp_path, "must", rank=1, broadcast=lambda _: (None, "", 2))
    assert raised.value.exit_code == 3


def test_what_is_not_the_first_ranks_is_not_taken_for_it(tmp_path):
    """Nodes that see another directory under the same name: an old copy, or nothing."""
    path = save_line(tmp_path, 1, 2)
    find_resume(tmp_path, "auto", rank=1, broadcast=lambda _: (path, "another hash", 0))
    flip_a_bit(path)
    with pytest.raises(RunError, match="differs"):
        verify_once(path)
    find_resume(tmp_path, "auto", rank=1, broadcast=lambda _: (tmp_path / "step_00000009", "a hash", 0))
    with pytest.raises(RunError, match="step_00000009/COMPLETE.json cannot be read") as raised:
        verify_once(tmp_path / "step_00000009")
    assert raised.value.exit_code == 3


def test_steps_are_ordered_as_numbers(tmp_path):
    for step in (9, 100):
        path = save(tmp_path, step)
        path.rename(tmp_path / f"step_{step}")
    assert newest_valid(tmp_path)[0].name == "step_100"


def test_what_a_killed_save_left_is_ignored_then_cleaned(tmp_path):
    newest = save_line(tmp_path, 1, 2)
    shutil.copytree(newest, tmp_path / "step_00000003.tmp")
    assert newest_valid(tmp_path) == (newest, [])
    newest = save(tmp_path, 3, [manifest_hash(newest)])
    verify(newest)
    prune(newest, keep_last=2)
    assert names(tmp_path) == ["step_00000002", "step_00000003"]


def test_prune_keeps_the_last_of_the_line(tmp_path):
    prune(save_line(tmp_path, 1, 2, 3, 4), keep_last=3)
    assert names(tmp_path) == ["step_00000002", "step_00000003", "step_00000004"]
    prune(tmp_path / "step_00000004", keep_last=5)
    assert len(names(tmp_path)) == 3


@pytest.mark.parametrize(
    ("options", "kept"),
    [
        ({"keep_last": 1}, [9]),
        ({"keep_last": 1, "keep_every_steps": 4}, [4, 8, 9]),
        ({"keep_last": 2, "best": "min"}, [3, 8, 9]),
        ({"keep_last": 1, "best": "max"}, [6, 9]),
        ({"keep_last": 1, "keep_every_steps": 3, "best": "min"}, [3, 6, 9]),
    ],
)
def test_prune_after_every_save_keeps_what_was_asked_for(tmp_path, options, kept):
    scores = {3: -0.5, 6: 0.7} if "best" in options else {}
    line = []
    for step in range(1, 10):
        path = save(tmp_path, step, line, score=scores.get(step))
        line = prune(path, **options)
    assert names(tmp_path) == [f"step_{step:08d}" for step in kept]
    assert line == [manifest_hash(tmp_path / name) for name in names(tmp_path)]


def test_a_corrupt_checkpoint_never_takes_the_place_of_a_good_one(tmp_path):
    save_line(tmp_path, 4, 8, 10, 20)
    for step in (10, 20):  # both fail, so the resume went back to 8; its next save lies between them
        flip_a_bit(tmp_path / f"step_{step:08d}")
    good, _ = newest_valid(tmp_path)
    line = [*read_manifest(good)["line"], manifest_hash(good)]
    prune(save(tmp_path, 15, line), keep_last=2)
    assert names(tmp_path) == ["step_00000008", "step_00000015"]


def test_a_step_saved_again_replaces_the_corrupt_one(tmp_path):
    flip_a_bit(save(tmp_path, 5))
    verify(save(tmp_path, 5))
    assert names(tmp_path) == ["step_00000005"]


@pytest.mark.parametrize("error", [TypeError, KeyboardInterrupt])
def test_a_failing_write_leaves_nothing_and_keeps_its_error(tmp_path, error):
    def write(path):
        (path / "half.bin").write_bytes(b"half")
        raise error("of the write")

    save(tmp_path, 1)
    with pytest.raises(error, match="of the write"):
        commit(tmp_path / "step_00000002", write, {}, 4)
    assert names(tmp_path) == ["step_00000001"]


def commit_together(directory, write, num_ranks=3):
    """Each rank in a thread of its own; what each one ended with."""
    barrier, said = threading.Barrier(num_ranks, timeout=20), [None] * num_ranks

    def run(rank):
        def exchange(own):
            said[rank] = own
            barrier.wait()
            everything = list(said)
            barrier.wait()
            return everything

        try:
            return commit(directory, partial(write, rank), {"step": 1}, 4, rank, exchange)
        except Exception as error:
            return error

    with ThreadPoolExecutor(num_ranks) as pool:
        return list(pool.map(run, range(num_ranks)))


def test_ranks_commit_together(tmp_path):
    def write(rank, path):
        (path / f"{rank}.bin").write_bytes(b"x" * rank)
        return [path / f"{rank}.bin"]

    assert commit_together(tmp_path / "step_1", write) == [tmp_path / "step_1"] * 3
    verify(tmp_path / "step_1")
    assert sorted(read_manifest(tmp_path / "step_1")["files"]) == ["0.bin", "1.bin", "2.bin"]


@pytest.mark.parametrize("error", [OSError("no room"), TypeError("a mistake")])
def test_one_rank_that_cannot_write_ends_all(tmp_path, error):
    def write(rank, path):
        if rank == 1:
            raise error
        (path / f"{rank}.bin").write_bytes(b"x")
        return [path / f"{rank}.bin"]

    first, second, third = commit_together(tmp_path / "step_1", write)
    assert names(tmp_path) == []
    assert isinstance(first, ConfigError)
    assert str(error) in str(first)
    assert str(first) == str(third)
    assert isinstance(second, ConfigError if isinstance(error, OSError) else TypeError)


@contextmanager
def small_disk(path, num_bytes):
    path.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={num_bytes}", "tmpfs", path], capture_output=True)
    if mounted.returncode:
        pytest.skip(f"no tmpfs can be mounted here: {mounted.stderr.decode().strip()}")
    try:
        yield path
    finally:
        subprocess.run(["umount", "--lazy", path], check=True)


@pytest.mark.parametrize("library", ["torch", "safetensors", "python"])
def test_a_full_disk(tmp_path, library):
    tensor = torch.zeros(500_000)

    def write(path):
        if library == "torch":
            torch.save(tensor, path / "x.pt")
        elif library == "safetensors":
            save_file({"x": tensor}, path / "x.safetensors")
        else:
            (path / "x.bin").write_bytes(bytes(tensor.nbytes))
        return path.iterdir()

    with small_disk(tmp_path / "disk", 1_000_000) as disk:
        older = save(disk, 1)
        message = r"step_00000002: the disk is full \(2000000 bytes needed, \d+ bytes free\)"
        with pytest.raises(ConfigError, match=message):
            commit(disk / "step_00000002", write, {}, tensor.nbytes)
        assert names(disk) == ["step_00000001"]
        verify(older)


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root, to become another user")
def test_a_directory_of_another_user(tmp_path):
    directory = tmp_path / "checkpoints"
    save(directory, 1)
    for path in (directory, *directory.parents[:3]):
        path.chmod(0o755)
    read_end, write_end = os.pipe()
    if (pid := os.fork()) == 0:
        os.setuid(65534)
        try:
            save(directory, 2)
        except ConfigError as error:
            os.write(write_end, json.dumps([str(error), names(directory)]).encode())
        os._exit(0)
    os.waitpid(pid, 0)
    os.close(write_end)
    with open(read_end) as stream:
        message, left = json.load(stream)
    assert "step_00000002: [Errno 13] Permission denied" in message
    assert "bytes free" in message
    assert left == ["step_00000001"]
    verify(directory / "step_00000001")
