#!/bin/bash
# %{job_name}: made by slurm/evaluate.py from slurm/evaluate.sh. One task, which starts a process a device.
#SBATCH --job-name=%{job_name}
#SBATCH --nodes=1
#SBATCH --ntasks=1
#SBATCH --cpus-per-task=%{cpus}
#SBATCH --time=%{time_minutes}
#SBATCH --output=%{log}
#SBATCH --chdir=%{working_directory}
%{options}

%{setup}

export SRUN_CPUS_PER_TASK=$SLURM_CPUS_PER_TASK # since Slurm 22.05 srun does not take it from sbatch
srun %{command}
