"""Two nodes under a real controller train what two processes on this machine do, also where they are stopped."""

import hashlib
import json
import subprocess
import sys
import time

import pytest

pytestmark = pytest.mark.slurm

CLUSTER = ["cluster=slurm", "cluster.time_minutes=10", "cluster.cpus_per_task=1", f"cluster.python={sys.executable}"]
LONG = ["autoencoder.trainer.max_steps=16", "autoencoder.callback.log.every_steps=1"]
LONG += ["diffusion.trainer.max_steps=16", "diffusion.callback.log.every_steps=1"]
LONG += ["+strategy@diffusion.strategy=deepspeed_zero2", "optim@diffusion.optim=adamw"]


def weights(directory):
    """sha256 of every file of weights that a run ends with."""
    files = sorted(directory.glob("*/checkpoints/step_*/*.safetensors"))
    return {str(file.relative_to(directory)): hashlib.sha256(file.read_bytes()).hexdigest() for file in files}


def steps(directory, stage):
    file = directory / "metrics.jsonl"
    rows = [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []
    return [row["step"] for row in rows if row.get("stage") == stage and "loss" in row]


def stop_at_step(slurm, job, directory, stage, step):
    """As Slurm does ahead of the limit, once the job is there."""
    slurm.wait(job, {"RUNNING"}, seconds=180)
    end = time.monotonic() + 180
    while max(steps(directory, stage), default=0) < step:
        assert time.monotonic() < end
        assert slurm.job(job)["JobState"] == "RUNNING", logs(directory)
        time.sleep(0.05)
    slurm.run("scancel", "--signal=USR1", job)


def test_both_stages_on_two_nodes_each_stopped_and_requeued_end_as_on_one_machine(slurm, small, command, tmp_path):
    """Stage 1 under DDP, stage 2 under ZeRO-2: the same weights, averages and W&B run, and no step is lost."""
    arguments, options = command(tmp_path / "local", *LONG, "devices=2")
    options["env"] |= {"GLOO_SOCKET_IFNAME": "lo"}
    local = subprocess.Popen(arguments, **options, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    try:
        run = tmp_path / "run"
        blind = [argument for argument in arguments if argument.endswith("=null")]
        offline = ["tracker=wandb", "tracker.mode=offline"]
        jobs = slurm.submit(*small, *blind, *LONG, *CLUSTER, *offline, "num_nodes=2", f"output_dir={run}")[2]
        ids = {}
        for stage, job in jobs.items():
            stop_at_step(slurm, job, run, stage, 3)
            ids[stage] = (run / stage / "wandb_id").read_text().strip()
            record = slurm.wait(job, seconds=180)
            assert (record["JobState"], record["Restarts"]) == ("COMPLETED", "1"), logs(run)
        printed = slurm.run(sys.executable, "slurm/status.py", run)
        _, error = local.communicate(timeout=180)
        assert local.returncode == 0, error
    finally:
        local.kill()
        local.wait()
    assert weights(run) == weights(tmp_path / "local")
    assert len(weights(run)) >= 4
    for stage in jobs:
        assert steps(run, stage) == [*range(1, 17)]
        assert len(list((run / "wandb").glob(f"offline-run-*-{ids[stage]}"))) == 2
    assert "goodput: 100.0% of the steps" in printed
    assert printed.count("16 of 16") == 2
    assert "ended with 0: done" in printed


def logs(directory):
    return "\n".join(path.read_text()[-3000:] for path in (directory / "slurm").glob("*.log"))
