#!/usr/bin/env bash
# A short run with SGLang, then every layout on a batch that it sampled, 10 updates later. From the root of the repository:
#   examples/layouts_cpu/run.sh [ARGUMENTS OF tools/compare_layouts.py]
set -euo pipefail
python=${PYTHON:-.venv/bin/python}
config=examples/layouts_cpu/config.yaml
"$python" examples/layouts_cpu/task.py runs/layouts-data
"$python" -m megatron_vespo.launch --ranks 1 "$config"
# The weights of the last checkpoint, so that the samples are off-policy: sampled 10 updates before.
"$python" tools/compare_layouts.py --config "$config" --batch runs/layouts/rollouts/batch_000002.msgpack \
    model.hf_path=runs/layouts/hf/latest "$@"
