#!/usr/bin/env bash
# Make an environment with everything a machine without a GPU needs: trainer, tests and SGLang.
#   tools/setup_env.sh [FOLDER]          default: .venv
set -euo pipefail
cd "$(dirname "$0")/.."
folder=${1:-.venv}

# A python3.12 on the PATH may be a pyenv shim that does not run: try each candidate.
find_python() {
    local candidate root
    root=$(pyenv root 2>/dev/null || echo "$HOME/.pyenv")
    for candidate in "${PYTHON:-}" python3.12 "$root"/versions/3.12*/bin/python python3 python; do
        if [ -n "$candidate" ] && "$candidate" -c 'import sys, venv; sys.exit(sys.version_info[:2] != (3, 12))' 2>/dev/null; then
            echo "$candidate"
            return
        fi
    done
    echo "error: no Python 3.12 found (Megatron-Core 0.19 needs it); install it, or name it: PYTHON=/path/to/python3.12 make ..." >&2
    exit 1
}

python=$(find_python)
echo "making $folder with $("$python" --version) ..."
[ -x "$folder/bin/python" ] || "$python" -m venv "$folder"
"$folder/bin/python" -m pip install --quiet --disable-pip-version-check "uv==$(sed -n 's/^uv==//p' constraints.txt)" 2>/dev/null
install=("$folder/bin/uv" pip install --quiet --python "$folder/bin/python" --compile-bytecode --constraint constraints.txt)
export UV_LINK_MODE=${UV_LINK_MODE:-hardlink}
unset PYTHONDONTWRITEBYTECODE # uv would then compile nothing, and every server start would take 40 s more
"${install[@]}" --requirement tools/requirements-cpu.txt
# Without its own requirements, which are 4 GB of CUDA kernels that a CPU cannot use.
"${install[@]}" --no-deps sglang sglang-router
"${install[@]}" --no-deps --no-build-isolation --editable .
# The tests look at the report in a browser; without one they skip that.
if ! command -v chromedriver >/dev/null && [ "$(id -u)" = 0 ] && command -v apt-get >/dev/null; then
    { apt-get update && apt-get install -y --no-install-recommends chromium chromium-driver; } >/dev/null 2>&1 ||
        echo "chromium could not be installed: the report is not tried in a browser" >&2
fi
echo "$folder is ready"
