"""Write docs/config.md from the types of the configuration: ``python tools/write_config_doc.py``."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

from megatron_vespo.config import Config, Section
from megatron_vespo.config.describe import Key, keys_of, one_line, places
from megatron_vespo.files import atomic_write
from megatron_vespo.megatron_options import REFUSED_MEGATRON_OPTIONS

TARGET = Path(__file__).parents[1] / "docs" / "config.md"

HEAD = """\
# Configuration

Made by `tools/write_config_doc.py` from the types in `megatron_vespo/config/`: change it there. The same text is in
`python -m megatron_vespo.train --help`.

A configuration is a YAML file. `section.key=value` on the command line overrides it; the value is YAML too:

    python -m megatron_vespo.launch --ranks 2 config.yaml training.steps=100 'evaluation={interval: 10}'

An unknown key or a wrong type is an error that names the key and the nearest one. What a run really used is in
`config.yaml` of its folder. `required` means that there is no default. In paths, `*` is a name of your own, or a place
in a list. A whole example: [examples/digits_cpu/rl.yaml](../examples/digits_cpu/rl.yaml).
"""

REFUSED = """\

Some fields exist in Megatron-Core and are refused here at the start:

| field | why |
| --- | --- |
"""


def render() -> str:
    """The document."""
    parts = [HEAD]
    for section, paths in places().items():
        parts += [_heading(section, paths), _table(section, paths)]
    parts.append("## Fields of Megatron-Core that are refused\n" + REFUSED + "\n".join(_refused()) + "\n")
    return "\n".join(parts)


def _heading(section: type[Section], paths: list[str]) -> str:
    if section is Config:
        return "## All sections\n"
    level = "##" if "." not in paths[0] else "###"
    return f"{level} {', '.join(f'`{path}`' for path in paths)}\n\n{_markdown(one_line(section.__doc__))}\n"


def _table(section: type[Section], paths: list[str]) -> str:
    """Keys have the section's path before them where it is at one place only."""
    prefix = f"{paths[0]}." if len(paths) == 1 and paths[0] else ""
    rows = [_row(prefix, key) for key in keys_of(section)]
    return "\n".join(["| key | type | default | meaning |", "| --- | --- | --- | --- |", *rows]) + "\n"


def _row(prefix: str, key: Key) -> str:
    name = f"{prefix}{key.name}"
    if key.section is not None:
        anchor = name.replace(".", "")
        default = "required" if key.default == "required" else ""
        return f"| [`{name}`](#{anchor}) | section | {default} | {_markdown(one_line(key.section.__doc__))} |"
    default = "required" if key.default == "required" else f"`{key.default}`"
    return f"| `{name}` | {_markdown(key.kind)} | {default} | {_markdown(key.meaning)} |"


def _refused() -> Iterator[str]:
    for name, reason in REFUSED_MEGATRON_OPTIONS.items():
        yield f"| `{name}` | {_markdown(reason)} |"


def _markdown(text: str) -> str:
    """A docstring as a cell of a table: pages become links."""
    text = text.replace("``", "`").replace("|", "\\|")
    return re.sub(r"\bdocs/(\w+\.md)", r"[\1](\1)", text)


if __name__ == "__main__":
    atomic_write(TARGET, render())
