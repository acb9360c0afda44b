#!/usr/bin/env bash
# Data, supervised start, reinforcement learning with the calculator. Run from the root of the repository.
#   examples/calculator/run.sh [SEED]
set -euo pipefail
python=${PYTHON:-.venv/bin/python}
seed=${1:-1}
"$python" -m examples.calculator.task runs/calculator-data --seed "$seed"
"$python" -m megatron_vespo.launch --ranks 2 examples/calculator/sft.yaml run.seed="$seed"
"$python" -m megatron_vespo.launch --ranks 2 examples/calculator/rl.yaml run.seed="$seed"
