"""Relative links in the documentation lead to files that exist, and their anchors to headings."""

from __future__ import annotations

import re
from collections import Counter
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
PAGES = [*sorted(ROOT.glob("*.md")), *sorted(DOCS.glob("*.md")), *sorted(ROOT.glob("*/*/README.md"))]
LINK = re.compile(r"\]\(([^()\s]+)\)")


def prose(text: str) -> str:
    """The page without fenced and indented code and without code spans, where nothing is a link."""
    text = re.sub(r"^```.*?^```$", "", text, flags=re.MULTILINE | re.DOTALL)
    text = re.sub(r"(?<=\n\n)(?: {4}.*\n+)+", "", text)
    return re.sub(r"`[^`\n]*`", "code", text)


@cache
def anchors(path: Path) -> frozenset[str]:
    """The anchors that GitHub gives to a page's headings."""
    text = re.sub(r"^```.*?^```$", "", path.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)
    seen: Counter[str] = Counter()
    found = set()
    for heading in re.findall(r"^#+ +(.+?) *$", text, re.MULTILINE):
        heading = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", heading)
        anchor = re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")
        found.add(f"{anchor}-{seen[anchor]}" if seen[anchor] else anchor)
        seen[anchor] += 1
    return frozenset(found)


def broken(page: Path, text: str) -> list[str]:
    """Links of a page that lead nowhere."""
    found = []
    for link in LINK.findall(prose(text)):
        if re.match(r"[a-z]+:", link):
            continue
        name, _, anchor = link.partition("#")
        target = (page.parent / name).resolve() if name else page
        if not target.exists() or (anchor and anchor not in anchors(target)):
            found.append(link)
    return found


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_resolve(page: Path) -> None:
    assert not broken(page, page.read_text(encoding="utf-8"))


def test_broken_links_are_found() -> None:
    page = DOCS / "health.md"
    good = "[a](faults.md) [b](faults.md#-a-rank-dies) [c](#the-panel) `[d](x.md)` [e](https://f.g/h)"
    assert not broken(page, good)
    text = f"{good} [i](nowhere.md) [j](faults.md#a-rank-sleeps) [k](#the-pane)"
    assert broken(page, text) == ["nowhere.md", "faults.md#a-rank-sleeps", "#the-pane"]


def test_the_index_names_every_page_once() -> None:
    linked = LINK.findall((DOCS / "README.md").read_text(encoding="utf-8"))
    assert sorted(linked) == sorted(page.name for page in DOCS.glob("*.md") if page.name != "README.md")
