"""Rows made by a task of reasoning_gym."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from typing import Any

from megatron_vespo.config import ReasoningGymSection
from megatron_vespo.data.rows import Row
from megatron_vespo.errors import UserError
from megatron_vespo.rewards.reasoning import ENTRY, open_task

# They walk through sets, whose order Python draws anew in every process: found by making prompts of all tasks twice.
UNREPEATABLE = {"isomorphic_strings", "knight_swap", "polynomial_multiplication", "ransom_note", "word_ladder"}


def rows(section: ReasoningGymSection) -> Iterator[Row]:
    """Yield (``reasoning_gym task:number``, row): the question as prompt, the task's own answer as label.

    Raises:
        UserError: as :func:`megatron_vespo.rewards.reasoning.open_task`, or the prompts would be others in another
            process, on which ranks and resumed runs rely.
    """
    if section.task in UNREPEATABLE and os.environ.get("PYTHONHASHSEED", "random") == "random":
        raise UserError(
            f"reasoning_gym task {section.task!r} makes other prompts in every process: start all ranks with"
            " PYTHONHASHSEED=0 in their environment"
        )
    config = json.dumps(section.config, sort_keys=True)
    for number in range(section.size):
        level = None if section.levels is None else number * section.levels // section.size
        item = open_task(section.task, config, level, section.seed, section.size)[number]
        # As JSON and back, since it travels to reward workers and into files, where there are no tuples.
        entry = json.loads(json.dumps({"task": section.task, "config": section.config, **item}))
        metadata: dict[str, Any] = {"id": f"{section.task}-{section.seed + number}", ENTRY: entry}
        if level is not None:
            metadata["difficulty"] = level
        row = {"prompt": item["question"], "label": item["answer"], "metadata": metadata}
        yield f"reasoning_gym {section.task}:{number + 1}", row
