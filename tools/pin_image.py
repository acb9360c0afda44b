"""Print pip constraints that keep what the image was built with: its own list, and every package built for its CUDA.

The image's list, the file that PIP_CONSTRAINT names, is empty in some releases; so torch, Transformer Engine and what
else is tied to CUDA is read from what is installed. Standard library only: it runs before anything is installed.
"""

from __future__ import annotations

import importlib.metadata
import os
import re
import sys
from collections.abc import Iterable
from fnmatch import fnmatch
from pathlib import Path

# Built for the image's CUDA, or compiled against what is: never replaced.
KEPT = (
    "torch*",
    "triton",
    "pytorch-triton",
    "transformer-engine*",
    "apex",
    "flash-attn*",
    "nvidia-*",
    "cuda-*",
    "numpy",
)
# Plain Python, or unknown to CUDA, and needed in the versions of requirements-trainer.txt: the image's are let go.
REPLACED = ("transformers", "tokenizers", "huggingface-hub", "safetensors", "packaging")


def canonical(name: str) -> str:
    """A distribution's name as pip compares it."""
    return re.sub(r"[-_.]+", "-", name).lower()


def constraints(listed: Iterable[str], installed: Iterable[tuple[str, str]]) -> list[str]:
    """Lines of the constraints file.

    Args:
        listed: Lines of the image's own list.
        installed: Names and versions of what is installed.
    """
    kept = {canonical(name): version for name, version in installed if name}
    pins = {n: f"{n}==={v}" for n, v in kept.items() if any(fnmatch(n, pattern) for pattern in KEPT)}
    for line in (line.split("#")[0].strip() for line in listed):
        name = canonical(re.split(r"[\s<>=!~@;\[]", line)[0])
        if name and name not in pins and name not in REPLACED:
            pins[name] = line
    return [pins[name] for name in sorted(pins)]


def main() -> int:
    """Print them."""
    own = Path(os.environ.get("PIP_CONSTRAINT") or "/etc/pip/constraint.txt")
    listed = own.read_text(encoding="utf-8").splitlines() if own.is_file() else []
    installed = ((d.metadata["Name"], d.version) for d in importlib.metadata.distributions())
    print("\n".join(constraints(listed, installed)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
