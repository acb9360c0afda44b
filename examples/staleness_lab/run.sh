#!/usr/bin/env bash
# A sweep of the staleness laboratory, and its write-up. From the root of the repository:
#   examples/staleness_lab/run.sh quick|full [ARGUMENTS OF examples.staleness_lab.sweep]
set -euo pipefail
python=${PYTHON:-.venv/bin/python}
grid=$1
export OMP_NUM_THREADS=1 PYTHONWARNINGS=ignore
exec "$python" -m examples.staleness_lab.sweep "examples/staleness_lab/$grid.yaml" --out "runs/lab-$grid" "${@:2}"
