"""What Slurm's variables say of a job whose tasks could not train together."""

import pytest

from sdtrain.errors import ConfigError
from sdtrain.strategy import slurm
from sdtrain.strategy.slurm import check_slurm

STEP = {
    "SLURM_NTASKS": "4",
    "SLURM_NTASKS_PER_NODE": "2",
    "SLURM_NNODES": "2",
    "SLURM_STEP_ID": "0",
    "SLURM_STEP_NUM_TASKS": "4",
    "SLURM_JOB_NAME": "train",
}


@pytest.fixture
def job(monkeypatch):
    """job(**changes): this process is a task of a right job but for the changes; None takes a variable away."""

    def make(**changes):
        for name, value in {**STEP, **{f"SLURM_{key}": value for key, value in changes.items()}}.items():
            if value is None:
                monkeypatch.delenv(name, raising=False)
            else:
                monkeypatch.setenv(name, value)

    return make


def test_without_slurm_and_in_a_right_job_nothing_is_said(job):
    job(NTASKS=None)
    check_slurm(2, 2)
    job()
    check_slurm(2, 2)
    check_slurm("auto", "auto")
    job(NTASKS="1", NTASKS_PER_NODE=None, NNODES="1", STEP_ID=None, STEP_NUM_TASKS=None)
    check_slurm(1, 1)


def test_torchrun_has_ranks_of_its_own(job, monkeypatch):
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "x")
    job(NTASKS="2", NTASKS_PER_NODE="1", STEP_NUM_TASKS="2")
    check_slurm(8, 2)


@pytest.mark.parametrize(
    ("changes", "devices", "said"),
    [
        ({"STEP_ID": None}, 2, "4 tasks, and this is one process alone; write srun"),
        ({"JOB_NAME": "bash"}, 2, "named 'bash' every task trains alone"),
        ({"JOB_NAME": "interactive"}, 2, "named 'interactive'"),
        ({}, 4, r"devices=4, and the Slurm job has --ntasks-per-node=2"),
        ({"NNODES": "4"}, 2, r"num_nodes=2, and the Slurm job has --nodes=4"),
        ({"NTASKS_PER_NODE": None, "NTASKS": "3"}, 2, "has 3 tasks; give it --ntasks-per-node=2 --nodes=2"),
    ],
)
def test_what_would_hang_or_train_alone_is_refused(job, changes, devices, said):
    job(**changes)
    with pytest.raises(ConfigError, match=said) as caught:
        check_slurm(devices, 2)
    assert "\n" not in str(caught.value)


def test_an_interactive_shell_may_start_its_own_processes(job):
    job(JOB_NAME="interactive", STEP_ID=None, STEP_NUM_TASKS=None)
    check_slurm(4, 1)


def test_a_task_that_sees_one_gpu_of_several_is_told_how_to_ask(job, monkeypatch):
    monkeypatch.setattr(slurm.torch.cuda, "device_count", lambda: 1)
    job()
    with pytest.raises(ConfigError, match=r"each task sees one GPU: ask Slurm for --gpus-per-node=2"):
        check_slurm(2, 2)
    job(NTASKS="1", NTASKS_PER_NODE="1", NNODES="1")
    check_slurm(1, 1)
