"""Texts for the supervised start: the task's own answers, some letters of which are replaced at random.

A model that learned them knows how to spell backward and errs as often as they do, which is what is left to the reward.
"""

from __future__ import annotations

import random
import string
from collections.abc import Iterator
from typing import Any

from megatron_vespo.config import ReasoningGymSection
from megatron_vespo.data import reasoning

WRONG_LETTER = 0.15
"""Share of letters that are drawn at random."""


def rows(seed: int, size: int, config: dict[str, Any]) -> Iterator[dict[str, str]]:
    """A data source ``function``; the arguments are those of a source ``reasoning_gym``."""
    rng = random.Random(seed)
    section = ReasoningGymSection(task="spell_backward", size=size, seed=seed, config=config)
    for _, row in reasoning.rows(section):
        letters = [rng.choice(string.ascii_lowercase) if rng.random() < WRONG_LETTER else c for c in row["label"]]
        yield {"prompt": row["prompt"], "response": "".join(letters)}
