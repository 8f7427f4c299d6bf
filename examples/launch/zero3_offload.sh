#!/usr/bin/env bash
# ZeRO-3 with weights and optimiser in the CPU's memory: for a base that does not fit otherwise.
#
#   examples/launch/zero3_offload.sh configs/mola.yaml
#
# GPUS=4 takes that many; MASTER_PORT is for a second run on the same machine.
set -euo pipefail

exec "$(dirname "$0")/single_node.sh" "$@" train.deepspeed=zero3_offload
