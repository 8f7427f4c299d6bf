#!/usr/bin/env bash
# One machine, a process on each of its GPUs, by DeepSpeed's launcher.
#
#   examples/launch/single_node.sh configs/mola.yaml train.deepspeed=zero2
#
# GPUS=4 takes that many; MASTER_PORT is for a second run on the same machine.
set -euo pipefail

export OMP_WAIT_POLICY=PASSIVE
launcher=(deepspeed --master_port "${MASTER_PORT:-29500}")
if [[ -n "${GPUS:-}" ]]; then
    launcher+=(--num_gpus "$GPUS")
fi
exec "${launcher[@]}" --module molora.train "$@"
