#!/usr/bin/env bash
# The same by torchrun. On one machine:
#
#   GPUS=8 examples/launch/torchrun.sh configs/mola.yaml train.deepspeed=zero2
#
# On each of several machines:
#
#   GPUS=8 NODES=2 NODE_RANK=1 MASTER_ADDR=first-machine \
#       examples/launch/torchrun.sh configs/mola.yaml train.deepspeed=zero2
set -euo pipefail

export OMP_WAIT_POLICY=PASSIVE
launcher=(torchrun --nproc-per-node "${GPUS:-gpu}")
if [[ "${NODES:-1}" == 1 ]]; then
    # a free port, whichever
    launcher+=(--standalone)
else
    launcher+=(--nnodes "$NODES" --node-rank "$NODE_RANK")
    launcher+=(--master-addr "$MASTER_ADDR" --master-port "${MASTER_PORT:-29500}")
fi
exec "${launcher[@]}" -m molora.train "$@"
