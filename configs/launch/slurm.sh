#!/bin/bash
# One training on all nodes of a Slurm job. It saves before the job's time is up, returns to the queue, and
# goes on.
#
#   source .venv/bin/activate    # the job gets the environment that it is submitted from
#   sbatch configs/launch/slurm.sh RUN_FOLDER --config C --data-dirs S --tokenizer-dir T
#
# Run it from the root of the checkout. The checkout, the environment, RUN_FOLDER, C, S and T must be on a
# disk that all nodes share. Another size: sbatch --nodes=4 --gpus-per-node=4 configs/launch/slurm.sh ...;
# give partition and account in the same way.
#
#SBATCH --job-name=lumi
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --exclusive
#SBATCH --time=24:00:00
#SBATCH --signal=B:USR1@300
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=%x-%j.log

set -u
run=${1:?usage: sbatch configs/launch/slurm.sh RUN_FOLDER --config C --data-dirs S --tokenizer-dir T}
shift
status_file=$run/status.json
status_before=$(cat "$status_file" 2>/dev/null)

# torchrun kills workers that have not left this many seconds after SIGTERM. Most of the 300 seconds before
# the end are for their checkpoint. Where a save takes longer (a large model, a slow disk), raise both:
#   TORCH_ELASTIC_SHUTDOWN_TIMEOUT=1740 sbatch --signal=B:USR1@1800 configs/launch/slurm.sh ...
export TORCH_ELASTIC_SHUTDOWN_TIMEOUT=${TORCH_ELASTIC_SHUTDOWN_TIMEOUT:-240}
first_node=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
# Jobs that share a node get different ports.
export LUMI_RENDEZVOUS=$first_node:$((20000 + SLURM_JOB_ID % 10000))
export LUMI_RENDEZVOUS_ID=$SLURM_JOB_ID-${SLURM_RESTART_COUNT:-0}

# SIGUSR1: the time is nearly up. The tasks, one torchrun a node, get SIGTERM and hand it to their workers.
# These save and leave.
ending=
trap 'ending=yes; scancel --signal=TERM "$SLURM_JOB_ID"' USR1
# SIGTERM before that comes by scancel alone. Slurm tells the tasks too, so that they save, but the job must
# not return to the queue. SIGTERM after it comes at the time limit, `KillWait` before SIGKILL: the job was
# not cancelled, its save has only outlasted its time.
cancelled=
trap '[[ -n $ending ]] || cancelled=yes' TERM

# shellcheck disable=SC2016  # the variables of a node are expanded there
srun --kill-on-bad-exit=0 bash -c '
    exec python -m torch.distributed.run \
        --nnodes="$SLURM_NNODES" --nproc-per-node="${SLURM_GPUS_ON_NODE:-1}" --max-restarts=3 \
        --local-addr="$SLURMD_NODENAME" \
        --rdzv-backend=c10d --rdzv-id="$LUMI_RENDEZVOUS_ID" --rdzv-endpoint="$LUMI_RENDEZVOUS" \
        --rdzv-conf="is_host=$((SLURM_NODEID == 0))" \
        lumi/train.py "$@"' lumi "$@" --output-dir "$run" --resume-from-checkpoint auto &
srun_pid=$!
while kill -0 "$srun_pid" 2>/dev/null; do
    wait "$srun_pid" # a signal ends the wait, not srun
done

# srun's exit code does not tell: torchrun exits with 1 even if every worker saved and left in order. The
# status does, unless an earlier start left it.
status=$(cat "$status_file" 2>/dev/null)
[[ $status != "$status_before" ]] || exit 1
case $status in
    *'"status": "finished"'*) exit 0 ;;
    *'"status": "preempted"'*) [[ -n $cancelled ]] || exec scontrol requeue "$SLURM_JOB_ID" ;;
esac
exit 1
