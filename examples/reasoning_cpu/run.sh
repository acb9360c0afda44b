#!/usr/bin/env bash
# The whole demo: model, supervised start, evaluation, reinforcement learning, evaluation, report. Run from the root of
# the repository.
#   examples/reasoning_cpu/run.sh [SEED] [short]
# short: a few steps of everything, which learn next to nothing but show whether it works.
set -euo pipefail
python=${PYTHON:-.venv/bin/python}
seed=${1:-1}
sft=() rl=()
if [ "${2:-}" = short ]; then
    sft=(training.steps=30)
    rl=(training.steps=2 evaluation.max_prompts=16 logging.rollout_groups=32)
fi
example=examples/reasoning_cpu
"$python" -m examples.reasoning_cpu.model $example/rl.yaml runs/reasoning-model
"$python" -m megatron_vespo.launch --ranks 2 $example/sft.yaml run.seed="$seed" "${sft[@]}"
"$python" -m megatron_vespo.launch --ranks 2 $example/rl.yaml run.seed="$seed" "${rl[@]}"
"$python" -m megatron_vespo.report runs/reasoning
"$python" -m examples.reasoning_cpu.learnt runs/reasoning
