"""What slurm/evaluate.py renders, refuses and sends; under a real controller a shell script stands for the tool."""

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import pytest

from sdtrain.config import load_config
from sdtrain.continuation import write_config

ROOT = Path(__file__).parents[2]
SENT = ["+experiment=smoke", "cluster=slurm", "cluster.cpus_per_task=2", "cluster.python=python"]


@pytest.fixture
def evaluate(capsys, monkeypatch):
    """evaluate(arguments) -> (exit code, standard output, standard error), in this process."""
    monkeypatch.syspath_prepend(ROOT / "slurm")
    spec = importlib.util.spec_from_file_location("slurm_evaluate", ROOT / "slurm" / "evaluate.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    yield lambda *arguments: (module.main([str(argument) for argument in arguments]), *capsys.readouterr())
    sys.modules.pop("submit", None)


def run_of(directory, *overrides, typed=SENT):
    directory.mkdir()
    write_config(directory, load_config([*typed, f"output_dir={directory}", *overrides]))
    return directory


def test_the_script_has_the_runs_cluster_and_the_tools_own_arguments(evaluate, tmp_path):
    run = run_of(tmp_path / "run", "cluster.partition=gpu", "cluster.container=[apptainer,exec,a.sif]", "devices=2")
    more = ("--protocol", "coco30k", "--guidance", "1.5", "3")
    code, script, _ = evaluate(run, "--devices", "8", "--minutes", "90", "--dry-run", *more)
    assert code == 0
    assert f"\nsrun apptainer exec a.sif python {ROOT}/tools/evaluate.py {run} --devices 8 {' '.join(more)}\n" in script
    for line in ("nodes=1", "ntasks=1", "cpus-per-task=16", "time=90", "gpus-per-node=8", 'partition="gpu"'):
        assert f"#SBATCH --{line}\n" in script
    assert "%{" not in script
    assert not (run / "slurm").exists()
    assert subprocess.run(["bash", "-n"], input=script, text=True).returncode == 0


def test_without_a_limit_of_its_own_it_has_the_runs(evaluate, tmp_path):
    _, script, _ = evaluate(run_of(tmp_path / "run", "cluster.time_minutes=77", "accelerator=cpu"), "--dry-run")
    assert "#SBATCH --time=77\n" in script
    assert "gpus" not in script


def test_what_is_no_run_of_a_cluster_is_told(evaluate, tmp_path):
    assert evaluate(tmp_path, "--dry-run")[::2] == (2, f"error: {tmp_path} is no run: it has no config.yaml\n")
    code, _, said = evaluate(run_of(tmp_path / "run", typed=["+experiment=smoke"]), "--dry-run")
    assert (code, "names no cluster" in said) == (2, True)


@pytest.mark.slurm
def test_it_waits_for_the_runs_last_job(slurm, tmp_path):
    python, run = tmp_path / "python", tmp_path / "run"
    python.write_text(
        f'#!/bin/bash\ncase $1 in */evaluate.py) printf "%s " "$@" >{tmp_path}/evaluated ;; *) '
        f"until [ -e {tmp_path}/go ]; do sleep 0.1; done; touch {tmp_path}/trained ;; esac\n"
    )
    python.chmod(0o755)
    typed = ["+experiment=smoke", "accelerator=cpu", "cluster=slurm", "cluster.cpus_per_task=1", f"output_dir={run}"]
    typed += [f"cluster.python={python}", "cluster.time_minutes=10", "stages=[diffusion]", "first_stage=identity"]
    trains = slurm.submit(*typed)[2]["diffusion"]
    said = slurm.run(sys.executable, "slurm/evaluate.py", run, "--devices", "2", "--num-images", "8")
    job = said.split("job ")[1].split()[0]
    assert f"after {trains}" in said
    assert slurm.job(job)["Dependency"].startswith(f"afterok:{trains}")
    (tmp_path / "go").touch()
    assert slurm.wait(job)["JobState"] == "COMPLETED"
    assert (tmp_path / "trained").exists()
    tool = ROOT / "tools" / "evaluate.py"
    assert (tmp_path / "evaluated").read_text() == f"{tool} {run} --devices 2 --num-images 8 "
    assert [json.loads(line)["job"] for line in (run / "slurm" / "jobs.jsonl").read_text().splitlines()] == [trains]
    assert " after " not in slurm.run(sys.executable, "slurm/evaluate.py", run)  # it waits for no job that has ended
