"""The job script under a real controller; a shell script stands for the training, so that each end of it can be had."""

import os
import time

import pytest

pytestmark = pytest.mark.slurm

# What runs in place of `python -m sdtrain`: it knows its run directory, and notes where it runs.
STAND_IN = """#!/bin/bash
run=${@: -1}
run=${run#output_dir=\\'}
run=${run%%\\'}
stage=$(printf '%%s\\n' "$@" | sed -n 's/^stages=\\[\\(.*\\)\\]$/\\1/p')
echo "$stage $SLURM_PROCID $SLURM_NODEID $SLURM_NNODES ${SLURM_RESTART_COUNT:-0} $MASTER_ADDR" >>"$run/tasks"
step() { mkdir -p "$run/$stage/checkpoints/step_0000000${SLURM_RESTART_COUNT:-0}"; }
leave() { [ "$SLURM_PROCID" = 0 ] || exit 0; touch "$run/$1"; exit 75; }
wait_for() { for _ in $(seq 600); do sleep 0.1; done; }
%s
"""
SMALL = ["+experiment=smoke", "accelerator=cpu", "cluster=slurm", "cluster.time_minutes=10", "cluster.cpus_per_task=1"]


@pytest.fixture
def send(slurm, tmp_path):
    """send(shell, *overrides) -> ids by stage, of jobs that run this shell."""

    def submit(shell, *overrides, stages="diffusion"):
        python = tmp_path / "python"
        python.write_text(STAND_IN % shell)
        python.chmod(0o755)
        own = ["first_stage=identity"] if stages == "diffusion" else []
        own += [f"stages=[{stages}]", f"output_dir={tmp_path}/run", f"cluster.python={python}"]
        return slurm.submit(*SMALL, *own, *overrides)[2]

    return submit


def running(slurm, job, file):
    """Waits until the job's tasks have begun, as the file says."""
    slurm.wait(job, {"RUNNING"})
    while not file.exists():
        time.sleep(0.1)
    time.sleep(0.3)  # for the trap


def log(tmp_path, stage, job):
    return (tmp_path / "run" / "slurm" / f"{stage}-{job}.log").read_text()


def test_it_is_requeued_at_its_limit_and_goes_on(slurm, send, tmp_path):
    shell = "trap 'step; leave REQUEUE' USR1; [ ${SLURM_RESTART_COUNT:-0} = 0 ] && wait_for; exit 0"
    job = send(shell, "num_nodes=2")["diffusion"]
    running(slurm, job, tmp_path / "run" / "tasks")
    slurm.run("scancel", "--signal=USR1", job)  # what Slurm does ahead of the limit
    record = slurm.wait(job)
    assert (record["JobState"], record["Restarts"]) == ("COMPLETED", "1")
    tasks = sorted((tmp_path / "run" / "tasks").read_text().splitlines())
    assert tasks == [f"diffusion {rank} {rank} 2 {again} 127.0.0.1" for rank in (0, 1) for again in (0, 1)]
    assert [f"attempt {n} of job {job}" in log(tmp_path, "diffusion", job) for n in (1, 2, 3)] == [True, True, False]


def test_the_controllers_own_signal_comes_ahead_of_a_real_limit(slurm, send):
    """Nobody but Slurm's clock sends it; a script without the signal would be ended at the limit, as TIMEOUT."""
    shell = "trap 'step; leave REQUEUE' USR1; [ ${SLURM_RESTART_COUNT:-0} = 0 ] && for _ in $(seq 8); do wait_for; done"
    limits = ["cluster.time_minutes=2", "cluster.max_step_seconds=5", "cluster.max_save_seconds=5"]
    record = slurm.wait(send(f"{shell}; exit 0", *limits)["diffusion"], seconds=180)
    assert (record["JobState"], record["Restarts"]) == ("COMPLETED", "1")


def test_a_config_that_is_edited_while_the_job_waits_is_refused_by_the_job(slurm, tmp_path):
    """By `python -m sdtrain` itself, in a second: what trains is what was sent, or nothing."""
    own = tmp_path / "own" / "experiment"
    own.mkdir(parents=True)
    (own / "mine.yaml").write_text("# @package _global_\ndefaults: [smoke]\ndiffusion: {optim: {lr: 1e-3}}\n")
    typed = ["+experiment=mine", *SMALL[1:], "--config-dir", tmp_path / "own", f"output_dir={tmp_path}/run"]
    job = slurm.submit(*typed, "stages=[autoencoder]", "cluster.lines=['--hold']")[2]["autoencoder"]
    (own / "mine.yaml").write_text("# @package _global_\ndefaults: [smoke]\ndiffusion: {optim: {lr: 2e-3}}\n")
    slurm.run("scontrol", "release", job)
    assert slurm.wait(job)["JobState"] == "FAILED"
    assert "sent: diffusion.optim.lr 0.001 -> 0.002\n" in log(tmp_path, "autoencoder", job)
    assert not (tmp_path / "run" / "metrics.jsonl").exists()


def test_a_run_that_makes_no_step_twice_is_not_requeued_for_ever(slurm, send, tmp_path):
    job = send("leave REQUEUE")["diffusion"]
    record = slurm.wait(job)
    assert (record["JobState"], record["Restarts"]) == ("FAILED", "2")
    assert "two attempts in a row made no step" in log(tmp_path, "diffusion", job)
    assert len((tmp_path / "run" / "tasks").read_text().splitlines()) == 2


@pytest.mark.parametrize(("options", "ends"), [([], "CANCELLED"), (["--signal=TERM"], "FAILED")])
def test_what_is_cancelled_does_not_come_back(slurm, send, tmp_path, options, ends):
    """The second way reaches the tasks alone, so that the script has to know."""
    job = send("trap 'step; leave STOPPED' TERM; wait_for")["diffusion"]
    running(slurm, job, tmp_path / "run" / "tasks")
    slurm.run("scancel", *options, job)
    record = slurm.wait(job)
    time.sleep(1)
    assert slurm.job(job)["JobState"] == record["JobState"] == ends
    assert (record["Restarts"], (tmp_path / "run" / "STOPPED").exists()) == ("0", True)


@pytest.mark.parametrize("handler", ["trap 'step; leave STOPPED' USR1", "trap 'exit 75' USR1", "true"])
def test_what_is_preempted_comes_back(slurm, send, tmp_path, handler):
    """The run leaves STOPPED, as on a cluster that sends TERM, or nothing but 75 while it loads, or nothing. That
    it is preempted only Slurm can tell.
    """
    job = send(f"{handler}; [ ${{SLURM_RESTART_COUNT:-0}} = 0 ] && wait_for; exit 0")["diffusion"]
    running(slurm, job, tmp_path / "run" / "tasks")
    urgent = slurm.run("sbatch", "--parsable", "-p", "urgent", "-N2", "--exclusive", "-o", "/dev/null", "--wrap=true")
    record = slurm.wait(job)
    assert (record["JobState"], record["Restarts"]) == ("COMPLETED", "1")
    assert slurm.job(urgent)["JobState"] == "COMPLETED"


def test_a_refused_requeue_fails(slurm, send, tmp_path):
    job = send("step; leave REQUEUE", "cluster.lines=[--no-requeue]")["diffusion"]
    assert slurm.wait(job)["JobState"] == "FAILED"
    assert "Slurm refused to requeue this job" in log(tmp_path, "diffusion", job)


def test_a_node_that_dies_costs_an_attempt(slurm, send, tmp_path):
    job = send("[ ${SLURM_RESTART_COUNT:-0} = 0 ] && wait_for; exit 0", "num_nodes=2")["diffusion"]
    running(slurm, job, tmp_path / "run" / "tasks")
    slurm.run("scontrol", "update", "nodename=node2", "state=down", "reason=test")
    record = slurm.wait(job)
    assert (record["JobState"], record["Restarts"]) == ("COMPLETED", "1")


def test_a_crash_is_a_failure_and_holds_the_next_stage_back(slurm, send):
    jobs = send("exit 1", stages="autoencoder,diffusion")
    assert slurm.wait(jobs["autoencoder"])["JobState"] == "FAILED"
    assert slurm.wait(jobs["diffusion"])["JobState"] == "CANCELLED"


def test_the_second_stage_waits_for_a_requeued_first(slurm, send, tmp_path):
    shell = "[ $stage$SLURM_RESTART_COUNT = autoencoder ] && { step; leave REQUEUE; }; exit 0"
    jobs = send(shell, "num_nodes=2", "cluster.autoencoder.num_nodes=1", stages="autoencoder,diffusion")
    assert slurm.wait(jobs["diffusion"])["JobState"] == "COMPLETED"
    said = [line.split() for line in (tmp_path / "run" / "tasks").read_text().splitlines()]
    assert [(line[0], line[3], line[4]) for line in said] == [
        ("autoencoder", "1", "0"),
        ("autoencoder", "1", "1"),
        ("diffusion", "2", "0"),
        ("diffusion", "2", "0"),
    ]


def test_an_array_trains_each_value_in_a_directory_of_its_own(slurm, send, tmp_path):
    shell = "[ $stage$SLURM_RESTART_COUNT = autoencoder ] && [ ${run: -1} = 1 ] && { step; leave REQUEUE; }; exit 0"
    jobs = send(shell, "--array", "seed=0,1", stages="autoencoder,diffusion")
    for task, restarts in (("0", "0"), ("1", "1")):
        assert slurm.wait(f"{jobs['autoencoder']}_{task}")["Restarts"] == restarts
        assert slurm.wait(f"{jobs['diffusion']}_{task}")["JobState"] == "COMPLETED"
        lines = (tmp_path / "run" / f"seed={task}" / "tasks").read_text().splitlines()
        assert len(lines) == 2 + int(restarts)
        assert (tmp_path / "run" / "slurm" / f"diffusion-{jobs['diffusion']}_{task}.log").exists()


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("cluster.partition=nowhere", "invalid partition specified: nowhere"),
        ("num_nodes=4", "node"),
        ("cluster.time_minutes=100", "time limit"),
        ("accelerator=gpu devices=4", "node"),
    ],
)
def test_what_the_cluster_cannot_give_is_told_before_the_first_job(slurm, tmp_path, override, said):
    typed = [*SMALL, f"output_dir={tmp_path}/run", *override.split(), "cluster.autoencoder.num_nodes=1"]
    code, printed, _ = slurm.submit(*typed, check=False)
    assert (code, printed.count("\n")) == (2, 1)
    assert said in printed.lower()
    assert "autoencoder.sh" in printed or "diffusion.sh" in printed
    assert slurm.run("squeue", "-h") == ""


def test_a_directory_is_trained_by_one_job(slurm, send, tmp_path):
    job = send("wait_for")["diffusion"]
    typed = [*SMALL, "stages=[diffusion]", "first_stage=identity", f"output_dir={tmp_path}/run"]
    code, printed, _ = slurm.submit(*typed, check=False)
    assert code == 2
    assert f"is being trained by job {job}; scancel {job} first" in printed
    slurm.run("scancel", job)
    slurm.wait(job)
    assert slurm.submit(*typed, "--test-only")[0] == 0
    assert os.listdir(tmp_path / "run" / "slurm")
    assert slurm.run("squeue", "-h") == ""
