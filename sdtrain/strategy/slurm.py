"""What a Slurm job must look like for its tasks to train together, told before any of them waits for another."""

from __future__ import annotations

import os

import torch

from sdtrain.errors import ConfigError

_INTERACTIVE = ("bash", "interactive")  # job names under which Lightning leaves Slurm's tasks alone


def check_slurm(devices: int | str, num_nodes: int | str) -> None:
    """Says nothing outside of Slurm, and under torchrun.

    Raises:
        ConfigError: where tasks would hang, or each train alone.
    """
    environment = os.environ
    if "SLURM_NTASKS" not in environment or "TORCHELASTIC_RUN_ID" in environment:  # torchrun has ranks of its own
        return
    num_tasks, name = int(environment["SLURM_NTASKS"]), environment.get("SLURM_JOB_NAME", "")
    if name in _INTERACTIVE:
        if int(environment.get("SLURM_STEP_NUM_TASKS", 1)) > 1:
            raise ConfigError(f"in a Slurm job named {name!r} every task trains alone; give it another --job-name")
        return
    if num_tasks > 1 and "SLURM_STEP_ID" not in environment:
        raise ConfigError(f"this Slurm job has {num_tasks} tasks, and this is one process alone; write srun python ...")
    for key, value, variable, option in (
        ("devices", devices, "SLURM_NTASKS_PER_NODE", "--ntasks-per-node"),
        ("num_nodes", num_nodes, "SLURM_NNODES", "--nodes"),
    ):
        given = environment.get(variable)
        if value != "auto" and given is not None and int(given) != value:
            raise ConfigError(f"{key}={value}, and the Slurm job has {option}={given}; they must be the same")
    if "auto" not in (devices, num_nodes) and num_tasks != devices * num_nodes:
        raise ConfigError(
            f"devices={devices} num_nodes={num_nodes}, and the Slurm job has {num_tasks} tasks;"
            f" give it --ntasks-per-node={devices} --nodes={num_nodes}"
        )
    if torch.cuda.device_count() == 1 and devices != "auto" and devices > 1:
        raise ConfigError(
            f"devices={devices}, and each task sees one GPU: ask Slurm for --gpus-per-node={devices},"
            " not for --gpus-per-task or --gpu-bind"
        )
