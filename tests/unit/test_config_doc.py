"""docs/config.md is what the types of the configuration say."""

from __future__ import annotations

import re

from megatron_vespo.config import Config
from megatron_vespo.config.describe import keys_of, places
from tools.write_config_doc import TARGET, render


def test_the_document_is_current() -> None:
    assert TARGET.read_text(encoding="utf-8") == render(), "run: python tools/write_config_doc.py"


def test_every_key_has_a_row_with_a_meaning() -> None:
    lines = render().splitlines()
    counted = 0
    for section, paths in places().items():
        prefix = f"{paths[0]}." if len(paths) == 1 and paths[0] else ""
        for key in keys_of(section):
            counted += 1
            rows = [line for line in lines if re.match(rf"\| \[?`{re.escape(prefix + key.name)}`", line)]
            assert rows, f"{prefix}{key.name} has no row"
            assert all(re.split(r"(?<!\\)\|", row)[4].strip() for row in rows), f"{prefix}{key.name} has no docstring"
    assert counted > 100


def test_limits_defaults_and_choices_are_told() -> None:
    text = render()
    assert "| `rollout.over_sampling` | float, >= 0, <= 1 | `0.0` |" in text
    assert "| `evaluation.confidence` | float, > 0, < 1 | `0.95` |" in text
    assert "| `algorithm.kl_estimator` | k2 \\| k3 | `k3` |" in text
    assert "| `training.steps` | int, >= 1 | required |" in text
    assert "list[str] \\| dict[str, int >= 1]" in text
    assert "`data.train`, `data.train.*`, `data.evaluation.*`" in text, "a section is told once, with all its places"


def test_no_text_is_taken_for_html() -> None:
    assert not re.search(r"<\w", re.sub(r"`[^`]*`", "", render()))


def test_sections_that_must_be_given_say_so() -> None:
    required = {name for name, field in Config.model_fields.items() if field.is_required()}
    assert required == {"run", "model", "training"}
    for name in required:
        assert f"| [`{name}`](#{name}) | section | required |" in render()
