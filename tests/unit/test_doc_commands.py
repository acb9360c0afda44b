"""Commands in the documentation name configurations, overrides, modules and scripts that exist."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest

from megatron_vespo.config_file import load_config
from megatron_vespo.errors import UserError

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")), *sorted(ROOT.glob("examples/*/README.md"))]


def commands(text: str) -> list[list[str]]:
    """The words of every command in indented code; continued lines are joined. Fenced code is a file, or is run."""
    text = re.sub(r"^```.*?^```$", "", text, flags=re.MULTILINE | re.DOTALL)
    text = re.sub(r" *\\\n +", " ", text)
    begins = r"(?:\S*python|torchrun|bash|examples/\S+|benchmarks/\S+)"
    return [shlex.split(line, comments=True) for line in re.findall(rf"^ {{4}}({begins} .*)$", text, re.MULTILINE)]


def overrides(words: list[str]) -> list[str]:
    return [word for word in words if re.match(r"[a-z_]+(\.[a-z_]+)*=", word)]


def wrong(words: list[str]) -> str:
    """What is wrong with a command; nothing where it is right, as far as can be told without running it."""
    if "-m" in words:
        module = words[words.index("-m") + 1]
        path = ROOT.joinpath(*module.split("."))
        if module.startswith("megatron_vespo") and not (path.with_suffix(".py").is_file() or path.is_dir()):
            return f"no module {module}"
    for word in words:
        if re.match(r"(examples|tools|benchmarks)/[\w/.]+\.(py|sh|yaml)$", word) and not (ROOT / word).is_file():
            return f"no file {word}"
    for word in words:
        if re.match(r"examples/[\w/]+\.yaml$", word):
            try:
                load_config(ROOT / word, overrides(words))
            except UserError as error:
                return str(error)
    return ""


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_commands_are_right(page: Path) -> None:
    found = {" ".join(words): wrong(words) for words in commands(page.read_text(encoding="utf-8"))}
    assert not {command: error for command, error in found.items() if error}


def test_wrong_commands_are_found() -> None:
    text = """
    python -m megatron_vespo.lunch --ranks 2 config.yaml
    python tools/estimates.py config.yaml
    python -m megatron_vespo.launch --ranks 2 examples/digits_cpu/rl.yaml run.name=x \\
        training.step=3                # a comment
    python -m megatron_vespo.launch --ranks 2 examples/digits_cpu/rl.yaml run.name=x training.steps=3
"""
    errors = [wrong(words) for words in commands(text)]
    assert [bool(error) for error in errors] == [True, True, True, False]
    assert "training.step: unknown key" in errors[2]


def test_the_pages_have_commands() -> None:
    assert sum(len(commands(page.read_text(encoding="utf-8"))) for page in PAGES) > 50
