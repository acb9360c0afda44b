#!/usr/bin/env bash
# One node's part of the job; train.sbatch starts it on each: node.sh CONFIG [section.key=value ...]
set -euo pipefail
echo $$ > "$PID_FOLDER/$SLURM_NODEID" # torchrun's, by exec
exec "$PYTHON" -m torch.distributed.run \
    --nnodes "$SLURM_JOB_NUM_NODES" \
    --nproc-per-node "${RANKS_PER_NODE:-${SLURM_GPUS_ON_NODE:?no GPUs on this node; set RANKS_PER_NODE}}" \
    --rdzv-backend c10d \
    --rdzv-endpoint "$RENDEZVOUS" \
    --rdzv-id "$RENDEZVOUS_ID" \
    --rdzv-conf "is_host=$((SLURM_NODEID == 0)),join_timeout=900,read_timeout=300" \
    --max-restarts 0 \
    -m megatron_vespo.train "$@" --resume auto
