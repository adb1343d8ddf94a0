"""What slurm/status.py makes of a run's files; scontrol is a script."""

import importlib.util
import json
import os
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.fixture
def module(monkeypatch):
    spec = importlib.util.spec_from_file_location("status", ROOT / "slurm" / "status.py")
    found = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "status", found)
    spec.loader.exec_module(found)
    return found


@pytest.fixture
def run(tmp_path, monkeypatch):
    """Stage 1 done in one go; stage 2 lost steps 11 to 14, waits for its third attempt; sent at 1000."""
    scontrol = tmp_path / "scontrol"
    record = "JobId=8 JobState=PENDING Reason=BeginTime NodeList=(null)"
    scontrol.write_text(f'#!/bin/bash\n[ "${{@: -1}}" = 8 ] && echo "{record}" || exit 1\n')
    scontrol.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    folder = tmp_path / "run"
    (folder / "slurm").mkdir(parents=True)
    jobs = [{"job": "7", "stage": "autoencoder", "time": 1000}, {"job": "8", "stage": "diffusion", "time": 1001}]
    (folder / "slurm" / "jobs.jsonl").write_text("".join(f"{json.dumps(job)}\n" for job in jobs))
    done = "autoencoder/checkpoints/step_00000004"
    (folder / "slurm" / "attempts").write_text(
        "7 1100 */checkpoints/step_????????\n"
        f"8 1200 {done}\n"
        f"8 1300 {done} diffusion/checkpoints/step_00000005 diffusion/checkpoints/step_00000010\n"
    )
    (folder / "config.yaml").write_text(
        "autoencoder: {trainer: {max_steps: 4}}\ndiffusion: {trainer: {max_steps: 40}}\n"
    )
    seen = [("autoencoder", step, 1100 + step, 2 * step) for step in (2, 4)]
    seen += [("diffusion", step, 1200 + step, step) for step in (5, 10, 14)]
    seen += [("diffusion", step, 1300 + step, step) for step in (15, 20)]
    rows = [{"stage": s, "step": n, "time": t, "seconds": seconds, "loss": 1.0} for s, n, t, seconds in seen]
    rows.insert(2, {"event": "checkpoint", "stage": "autoencoder", "step": 4, "seconds": 0.5, "time": 1104})
    rows.append({"event": "stop", "stage": "diffusion", "step": 22, "time": 1330})
    (folder / "metrics.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    return folder


def test_what_was_done_twice_is_counted_once(module, run):
    first, second = module.read_jobs(run)
    assert (first.step, first.num_kept, first.num_run, first.kept_seconds) == (4, 4, 4, 8)
    assert (second.step, second.num_kept, second.num_run, second.kept_seconds) == (22, 22, 14 + 12, 20)
    assert second.starts == [(1200, 0), (1300, 10)]
    assert second.since_sent_seconds(is_over=True) == 329
    first.rows = []
    assert first.since_sent_seconds(is_over=True) == 100  # it ended before it wrote a row


def test_the_chain_in_one_table(module, run, capsys):
    assert module.main([str(run)]) == 0
    printed = capsys.readouterr().out
    rows = [[cell.strip() for cell in line.strip("│").split("│")] for line in printed.splitlines() if "│" in line]
    assert rows[0][:7] == ["7", "autoencoder", "gone", "-", "1", "4/4", "4 of 4"]
    assert rows[0][7:] == ["8 s", "1 min 44 s"]
    assert rows[1][:7] == ["8", "diffusion", "PENDING (BeginTime)", "-", "2", "22/40", "22 of 26"]
    assert "goodput: 86.7% of the steps" in printed


def test_a_second_chain_in_the_same_directory_counts_its_own_steps(module, run):
    with (run / "slurm" / "jobs.jsonl").open("a") as file:
        file.write('{"job": "9", "stage": "diffusion", "time": 1400}\n')
    with (run / "slurm" / "attempts").open("a") as file:
        file.write("9 1410 diffusion/checkpoints/step_00000022\n")
    with (run / "metrics.jsonl").open("a") as file:
        file.write('{"stage": "diffusion", "step": 30, "time": 1450, "seconds": 30, "loss": 1}\n')
    _, before, after = module.read_jobs(run)
    assert (before.num_kept, before.num_run, before.kept_seconds) == (22, 26, 20)
    assert (after.step, after.num_kept, after.num_run, after.kept_seconds) == (30, 8, 8, 10)


def test_a_run_that_was_not_sent(module, tmp_path, capsys):
    assert module.main([str(tmp_path)]) == 2
    assert "holds no run that slurm/submit.py sent" in capsys.readouterr().err


def test_a_run_that_waits_for_its_first_start(module, run, capsys):
    for name in ("metrics.jsonl", "slurm/attempts"):
        (run / name).unlink()
    (run / "exit.json").write_text('{"exit_code": 0, "reason": "done"}')
    assert module.main([str(run)]) == 0
    printed = capsys.readouterr().out
    assert "0/40" in printed
    assert "goodput" not in printed
    assert "ended with" not in printed  # it is of an attempt before


def test_what_it_ended_with_is_told_as_it_was_said(module, run, capsys):
    (run.parent / "scontrol").write_text("#!/bin/bash\nexit 1\n")
    (run / "exit.json").write_text('{"exit_code": 2, "reason": "stages=[diffusion] is not"}')
    assert module.main([str(run)]) == 0
    assert "ended with 2: stages=[diffusion] is not" in capsys.readouterr().out
