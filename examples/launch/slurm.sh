#!/usr/bin/env bash
#SBATCH --job-name=molora
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=8
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=8
#SBATCH --time=24:00:00
#SBATCH --signal=TERM@180
#SBATCH --requeue
#
# Slurm, one task a GPU; every task finds its rank in Slurm's variables.
#
#   sbatch examples/launch/slurm.sh configs/mola.yaml train.deepspeed=zero2
#
# Three minutes before the time is over every task gets SIGTERM and leaves a checkpoint, from which
# the next job goes on. Ask for GPUs by node, not by task: a task that sees only its own cannot take
# the one with its local rank.
set -euo pipefail

hosts="$(scontrol show hostnames "$SLURM_JOB_NODELIST")"
export MASTER_ADDR="${hosts%%$'\n'*}"
export OMP_WAIT_POLICY=PASSIVE
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-${SLURM_CPUS_PER_TASK:-1}}"
exec srun --kill-on-bad-exit=1 python -m molora.train --resume auto "$@"
