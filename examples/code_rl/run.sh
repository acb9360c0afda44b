#!/usr/bin/env bash
# One node of 8 GPUs: 4 train, 4 serve. From the root of the repository:
#   examples/code_rl/run.sh [section.key=value ...]
# PYTHON is the trainer's interpreter (default: python).
set -euo pipefail
exec "${PYTHON:-python}" -m megatron_vespo.launch --ranks 4 examples/code_rl/async.yaml "$@"
