"""Messages that docs/production.md quotes are there in the source."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from megatron_vespo.config import Config

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "production.md").read_text(encoding="utf-8")
# Torch's own.
UPSTREAM = {"torch.OutOfMemoryError"}


def texts() -> Iterator[str]:
    """Every text in the package; what is filled in is an ellipsis."""
    for path in (ROOT / "megatron_vespo").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Constant) and isinstance(node.value, str):
                yield node.value
            elif isinstance(node, ast.JoinedStr):
                yield "".join(part.value if isinstance(part, ast.Constant) else "..." for part in node.values)


TEXTS = list(texts())


def quoted_messages() -> list[str]:
    section = PAGE.split("## Messages, and what to do")[1]
    return [row.group(1) for row in re.finditer(r"^\| `([^`]+)`", section, re.MULTILINE)]


def occurs(message: str) -> bool:
    pattern = re.compile(".*".join(map(re.escape, message.split("..."))), re.DOTALL)
    return any(pattern.search(text) for text in TEXTS)


@pytest.mark.parametrize("message", [m for m in quoted_messages() if m not in UPSTREAM])
def test_a_quoted_message_is_one_of_ours(message: str) -> None:
    assert occurs(message)


def test_there_are_messages_and_others_are_not_found() -> None:
    assert len(quoted_messages()) > 35
    assert not occurs("does not divide the model's ... attention feet")


def test_settings_that_are_named_exist() -> None:
    for section, key in set(re.findall(r"`([a-z_]+)\.([a-z_]+)[`:=]", PAGE)):
        if section in Config.model_fields and section not in ("megatron", "sglang"):
            assert key in Config.model_fields[section].annotation.model_fields, f"{section}.{key}"


def test_files_that_are_linked_exist() -> None:
    for target in set(re.findall(r"\]\(([^)#]+)\)", PAGE)):
        assert (ROOT / "docs" / target).exists(), target
