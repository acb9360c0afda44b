#!/usr/bin/env bash
# One node's part of the job: start it on every node, from the root of the repository, which all nodes see.
#   NNODES=2 NODE_RANK=0 MASTER_ADDR=node0 VESPO_SERVER_KEY=... examples/qwen3_30b_a3b/run.sh sync|async [section.key=value ...]
# PYTHON is the trainer's interpreter (default: python), MASTER_PORT a free port of the first node (default: 29500).
set -euo pipefail
case "${1:-}" in
    sync) ranks=8 ;;  # every GPU of a node trains and serves in turns
    async) ranks=4 ;; # the other four serve
    *)
        echo "usage: run.sh sync|async [section.key=value ...]" >&2
        exit 2
        ;;
esac
config=examples/qwen3_30b_a3b/$1.yaml
shift
export VESPO_SERVER_KEY=${VESPO_SERVER_KEY:?the API key of the SGLang servers, the same on all nodes}
export CUDA_DEVICE_MAX_CONNECTIONS=${CUDA_DEVICE_MAX_CONNECTIONS:-1} OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
exec "${PYTHON:-python}" -m torch.distributed.run \
    --nnodes "${NNODES:-2}" \
    --node-rank "${NODE_RANK:?number of this node, from 0}" \
    --master-addr "${MASTER_ADDR:?address of node 0}" \
    --master-port "${MASTER_PORT:-29500}" \
    --nproc-per-node "$ranks" \
    -m megatron_vespo.train "$config" "$@"
