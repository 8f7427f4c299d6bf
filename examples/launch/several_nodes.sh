#!/usr/bin/env bash
# Several machines that see the same files, by DeepSpeed's launcher and a hostfile, whose lines are
#
#   first-machine slots=8
#   second-machine slots=8
#
# With ssh from the first machine to the others, once, on the first:
#
#   HOSTFILE=hostfile examples/launch/several_nodes.sh configs/mola.yaml train.deepspeed=zero2
#
# Without ssh, on every machine, the first being NODE_RANK=0:
#
#   HOSTFILE=hostfile NODE_RANK=1 MASTER_ADDR=first-machine \
#       examples/launch/several_nodes.sh configs/mola.yaml train.deepspeed=zero2
#
# Environment variables for all machines go into ~/.deepspeed_env, one NAME=VALUE a line.
set -euo pipefail

export OMP_WAIT_POLICY=PASSIVE
launcher=(deepspeed --hostfile "${HOSTFILE:-hostfile}" --master_port "${MASTER_PORT:-29500}")
if [[ -n "${NODE_RANK:-}" ]]; then
    launcher+=(--no_ssh --node_rank "$NODE_RANK" --master_addr "$MASTER_ADDR")
fi
exec "${launcher[@]}" --module molora.train "$@"
