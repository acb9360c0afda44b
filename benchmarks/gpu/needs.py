"""Says what this environment lacks for the GPU tests and benchmarks; the exit status is 1 if that is anything needed.

python -m benchmarks.gpu.needs
"""

from __future__ import annotations

import importlib
import sys

NEEDED = {
    "torch": "with CUDA",
    "triton": "comes with torch",
    "numpy": "samples",
    "msgspec": "what ranks tell each other",
    "pydantic": "types of Megatron's options",
    "safetensors": "checkpoints of the tests",
    "megatron.core": "the trainer; megatron-core",
    "transformer_engine.pytorch": "its GPU layers; transformer-engine[pytorch]",
}
"""Module -> what for, and the package where it has another name."""
OPTIONAL = {
    "pytest": "tests/gpu",
    "transformers": "tests/gpu: comparison with Hugging Face, left out without it",
    "tokenizers": "tests/gpu: tiny checkpoints have a tokenizer",
}


def missing(modules: dict[str, str]) -> list[str]:
    """One line for each module that does not import."""
    lines = []
    for name, reason in modules.items():
        try:
            importlib.import_module(name)
        except (ImportError, OSError) as error:  # OSError: a shared library is not there
            lines.append(f"{name} ({reason}): {error}")
    return lines


def main() -> int:
    """Print them."""
    needed = missing(NEEDED)
    for line in needed:
        print(f"missing: {line}", file=sys.stderr)
    for line in missing(OPTIONAL):
        print(f"not there, and not needed for the benchmarks: {line}", file=sys.stderr)
    return 1 if needed else 0


if __name__ == "__main__":
    raise SystemExit(main())
