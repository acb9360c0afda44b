#!/usr/bin/env bash
# The demo under faults: data, supervised start, then chaos.py. Run from the root of the repository.
#   examples/chaos_cpu/run.sh [--goal 0.9]
set -euo pipefail
python=${PYTHON:-.venv/bin/python}
"$python" examples/digits_cpu/task.py runs/chaos-data
"$python" -m megatron_vespo.launch --ranks 2 examples/digits_cpu/sft.yaml run.name=chaos-sft \
    model.hf_path=runs/chaos-data/model data.train=runs/chaos-data/sft.jsonl
"$python" -m examples.chaos_cpu.chaos "$@"
