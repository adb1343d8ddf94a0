#!/bin/bash
# %{job_name}: made by slurm/submit.py from slurm/job.sh. One task a device; every attempt appends to the same log.
#SBATCH --job-name=%{job_name}
#SBATCH --nodes=%{num_nodes}
#SBATCH --ntasks-per-node=%{devices}
#SBATCH --cpus-per-task=%{cpus_per_task}
#SBATCH --time=%{time_minutes}
#SBATCH --signal=USR1@%{lead_seconds}
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=%{log}
#SBATCH --chdir=%{working_directory}
%{options}

%{run}
job=${SLURM_ARRAY_JOB_ID:+${SLURM_ARRAY_JOB_ID}_}${SLURM_ARRAY_TASK_ID:-$SLURM_JOB_ID}

# The ranks meet at the first node, by the address that Slurm has of it.
first=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
address=$(scontrol show node -o "$first" | sed -n 's/.*NodeAddr=\([^ ]*\).*/\1/p')
export MASTER_ADDR=%{master_address} MASTER_PORT=$((15000 + SLURM_JOB_ID % 15000))
export SRUN_CPUS_PER_TASK=$SLURM_CPUS_PER_TASK # since Slurm 22.05 srun does not take it from sbatch

%{setup}

# Each attempt notes the checkpoints that it finds. Two that added none would be followed by such attempts for ever.
mkdir -p "$run/slurm"
found=$(cd "$run" && echo */checkpoints/step_????????)
echo "$job $(date +%s) $found" >>"$run/slurm/attempts"
attempts=$(grep "^$job " "$run/slurm/attempts")
if [ "$(tail -n 3 <<<"$attempts" | cut -d " " -f 3- | grep -cxF "$found")" = 3 ]; then
    echo "stopped: two attempts in a row made no step" >&2
    exit 1
fi

echo "attempt $(wc -l <<<"$attempts") of job $job on $SLURM_JOB_NODELIST, $(date +%FT%T)"
rm -f "$run/REQUEUE" "$run/STOPPED"
srun --kill-on-bad-exit=1 %{command} "${arguments[@]}"
code=$?

# The run saved and left REQUEUE: its time is up. It left STOPPED: it was cancelled, or is preempted, which alone comes back.
# So it is where a signal ended it (75), or killed it, while it loaded, and it could leave nothing.
again=0
[ -e "$run/REQUEUE" ] && again=1
if [ -e "$run/STOPPED" ] || [ $code = 75 ] || [ $code -gt 128 ]; then
    case $(scontrol show job -o "$SLURM_JOB_ID") in *JobState=RUNNING*PreemptTime=2*) again=1 ;; esac
fi
if [ $again = 1 ]; then
    scontrol requeue "$job" && sleep 120
    echo "failed: Slurm refused to requeue this job; send it again" >&2
    code=1
fi
exit $code
