"""What upstream packages call their options, read from their sources without importing them.

Importing Megatron-Core or SGLang takes seconds and may need a GPU; a misspelt key should be found before that.
"""

from __future__ import annotations

import ast
import difflib
import sys
from collections.abc import Iterable
from functools import cache
from pathlib import Path

# (source file below a site-packages folder, class) of every dataclass the ``megatron:`` section may set.
MEGATRON_CONFIGS = (
    ("megatron/core/model_parallel_config.py", "ModelParallelConfig"),
    ("megatron/core/transformer/transformer_config.py", "TransformerConfig"),
    ("megatron/core/optimizer/optimizer_config.py", "OptimizerConfig"),
    ("megatron/core/distributed/distributed_data_parallel_config.py", "DistributedDataParallelConfig"),
)


@cache
def class_fields(source: str, class_name: str) -> frozenset[str] | None:
    """Annotated names in the body of a class of an installed package.

    Args:
        source: File of the class, relative to a folder of ``sys.path``.
        class_name: Name of the class.

    Returns:
        The names, or None where the package is not installed in this environment.
    """
    for folder in sys.path:
        path = Path(folder) / source
        if path.is_file():
            for node in ast.parse(path.read_text(encoding="utf-8")).body:
                if isinstance(node, ast.ClassDef) and node.name == class_name:
                    return frozenset(
                        item.target.id
                        for item in node.body
                        if isinstance(item, ast.AnnAssign) and isinstance(item.target, ast.Name)
                    )
    return None


def megatron_fields() -> frozenset[str] | None:
    """Every name the ``megatron:`` section may set, or None where megatron-core is not installed."""
    names: set[str] = set()
    for source, class_name in MEGATRON_CONFIGS:
        fields = class_fields(source, class_name)
        if fields is None:
            return None
        names |= fields
    return frozenset(names)


def nearest_name(key: str, known: Iterable[str]) -> str | None:
    """The known name most like ``key``, if one is near."""
    return next(iter(difflib.get_close_matches(key, sorted(known), n=1)), None)


def nearest(key: str, known: Iterable[str]) -> str:
    """``; did you mean 'x'?`` for error messages, or nothing where no known name is near."""
    name = nearest_name(key, known)
    return f"; did you mean '{name}'?" if name else ""
