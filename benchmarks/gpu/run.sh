#!/usr/bin/env bash
# All GPU benchmarks; see README.md beside this. Tables go to $OUT (default: runs/gpu_benchmarks).
#     PYTHON=/path/to/python OUT=folder benchmarks/gpu/run.sh [--only head ...]
set -uo pipefail
cd "$(dirname "$0")/../.."
python=${PYTHON:-python3}
out=${OUT:-runs/gpu_benchmarks}
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1
export CUDA_DEVICE_MAX_CONNECTIONS=${CUDA_DEVICE_MAX_CONNECTIONS:-1}
"$python" -m benchmarks.gpu.needs || exit 2
mkdir -p "$out"
"$python" -W ignore -m benchmarks.gpu --out "$out" "$@" 2> >(tee "$out/log.txt" >&2)
