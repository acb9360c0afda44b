#!/usr/bin/env bash
# The whole demo: model, supervised start, reinforcement learning. Run from the root of the repository.
#   examples/reasoning_cpu/run.sh [SEED]
set -euo pipefail
python=${PYTHON:-.venv/bin/python}
seed=${1:-1}
"$python" -m examples.reasoning_cpu.model examples/reasoning_cpu/rl.yaml runs/reasoning-model
"$python" -m megatron_vespo.launch --ranks 2 examples/reasoning_cpu/sft.yaml run.seed="$seed"
"$python" -m megatron_vespo.launch --ranks 2 examples/reasoning_cpu/rl.yaml run.seed="$seed"
