"""What docs/troubleshooting.md quotes is there: messages in the sources, metrics, conditions, settings."""

from __future__ import annotations

import re

import pytest

from megatron_vespo.algorithms.diagnosis import CAUSES
from megatron_vespo.config import Config
from megatron_vespo.metrics.conditions import CONDITIONS
from megatron_vespo.metrics.registry import METRICS
from tests.sources import ROOT, occurs

PAGES = {name: (ROOT / "docs" / name).read_text(encoding="utf-8") for name in ("troubleshooting.md", "production.md")}
PAGE = PAGES["troubleshooting.md"]
# Torch's own, and a file.
UPSTREAM = {"torch.OutOfMemoryError", "sglang.log"}


def first_cells(text: str) -> list[str]:
    """What stands in the first column of the tables, without their heads."""
    rows = re.findall(r"^\| (.*?) \|", re.sub(r"^\|.*\n\| ---.*$", "", text, flags=re.MULTILINE), re.MULTILINE)
    assert rows
    return rows


def quoted(cells: list[str]) -> list[str]:
    return [text for cell in cells for text in re.findall(r"`([^`]+)`", cell)]


FIGURES, MESSAGES = PAGE.split("## Figures that look wrong")[1].split("## Warnings of the health panel")


@pytest.mark.parametrize("message", [m for m in quoted(first_cells(MESSAGES)) if m not in UPSTREAM])
def test_a_quoted_message_is_one_of_ours(message: str) -> None:
    assert occurs(message)


def test_there_are_messages_and_others_are_not_found() -> None:
    assert len(quoted(first_cells(MESSAGES))) > 80
    assert not occurs("does not divide the model's ... attention feet")


def test_figures_are_metrics() -> None:
    names = [name for name in quoted(first_cells(FIGURES)) if "/" in name]
    assert len(names) > 15
    assert set(names) <= set(METRICS)


def test_every_condition_and_cause_of_the_panel_is_told() -> None:
    for condition in CONDITIONS.values():
        assert f"`{condition.name}`" in MESSAGES and f"`{condition.meaning}`" in MESSAGES
    for cause in CAUSES:
        assert f"`{cause.sentence.split(':')[0]}" in MESSAGES or f"`{cause.sentence.split(' (')[0]}`" in MESSAGES


@pytest.mark.parametrize("name", PAGES)
def test_settings_that_are_named_exist(name: str) -> None:
    named = set(re.findall(r"`([a-z_]+)\.([a-z_]+)[`:=]", PAGES[name]))
    assert len(named) > 5
    for section, key in named:
        if section in Config.model_fields and section not in ("megatron", "sglang"):
            assert key in Config.model_fields[section].annotation.model_fields, f"{section}.{key}"
