#!/usr/bin/env bash
# The whole demo: data, supervised start, reinforcement learning. Run from the root of the repository.
#   examples/digits_cpu/run.sh [SEED]
set -euo pipefail
python=${PYTHON:-.venv/bin/python}
seed=${1:-1}
"$python" examples/digits_cpu/task.py runs/demo-data --seed "$seed"
"$python" -m megatron_vespo.launch --ranks 2 examples/digits_cpu/sft.yaml run.seed="$seed"
"$python" -m megatron_vespo.launch --ranks 2 examples/digits_cpu/rl.yaml run.seed="$seed"
