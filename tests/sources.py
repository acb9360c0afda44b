"""What the sources say: messages that the documentation quotes must be among it."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path

ROOT = Path(__file__).parents[1]


def _texts() -> Iterator[str]:
    for path in (ROOT / "megatron_vespo").rglob("*.py"):
        nodes = list(ast.walk(ast.parse(path.read_text(encoding="utf-8"))))
        comments = {id(node.value) for node in nodes if isinstance(node, ast.Expr)}  # docstrings
        for node in nodes:
            if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in comments:
                yield node.value
            elif isinstance(node, ast.JoinedStr):
                yield "".join(part.value if isinstance(part, ast.Constant) else "..." for part in node.values)
    for path in (ROOT / "tools").glob("*.sh"):
        yield path.read_text(encoding="utf-8")


@cache
def texts() -> tuple[str, ...]:
    """Texts of the package, docstrings apart, and shell scripts of ``tools/``; what is filled in is an ellipsis."""
    return tuple(_texts())


def occurs(message: str) -> bool:
    """Whether a quoted message, in which an ellipsis stands for anything, is a part of one of them."""
    pattern = re.compile(".*".join(map(re.escape, message.split("..."))), re.DOTALL)
    return any(pattern.search(text) for text in texts())
