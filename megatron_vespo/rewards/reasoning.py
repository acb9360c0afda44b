r"""Tasks of the package reasoning_gym: opening one by name, and the reward that a task itself gives an answer.

The package has about a hundred procedural tasks, each with a generator, a scorer that takes every right answer, and
mostly levels of difficulty. It is imported when the first sample is scored, which takes a few seconds once in a worker.
"""

from __future__ import annotations

import json
import re
import warnings
from collections.abc import Mapping
from difflib import get_close_matches
from functools import lru_cache
from typing import Any

from megatron_vespo.errors import UserError
from megatron_vespo.types import Sample

ENTRY = "reasoning_gym"
"""Key of the metadata with what the scorer needs: task, config, question, answer and the task's own metadata."""

# Scorers of these tasks compare with tuples, which JSON turned into lists.
_COMPARE_TUPLES = {"arc_agi", "rearc"}
# What scorers raise at answers that they cannot read.
_UNREADABLE = (ValueError, TypeError, LookupError, AttributeError, SyntaxError, ArithmeticError)
_SPECIAL = re.compile(r"<\|[^<>|]*\|>|</s>|<eos>|<pad>")
_TAGGED = re.compile(r"<answer>(.*?)</answer>", re.DOTALL)


def reasoning_gym(sample: Sample) -> float:
    """What the task's own ``score_answer`` gives the response's answer: 1 if it is right, often less for parts of it.

    The answer is what stands in the last ``<answer>...</answer>``, without any the whole response; end-of-text tokens
    and spaces around it are no part of it. The prompt must come from a source ``reasoning_gym``. An answer that the
    scorer cannot read gets 0.

    Raises:
        UserError: The prompt comes from elsewhere.
    """
    entry = sample.prompt.metadata.get(ENTRY)
    if not isinstance(entry, dict):
        raise UserError("reward reasoning_gym scores prompts of a data source reasoning_gym; this prompt is of another")
    task = open_task(entry["task"], json.dumps(entry["config"], sort_keys=True))
    metadata = _tuples(entry["metadata"]) if entry["task"] in _COMPARE_TUPLES else entry["metadata"]
    original = {"question": entry["question"], "answer": entry["answer"], "metadata": metadata}
    try:
        return float(task.score_answer(extract_answer(sample.text), original))
    except _UNREADABLE:
        return 0.0


def extract_answer(text: str) -> str:
    """The answer in a response; see :func:`reasoning_gym`."""
    text = _SPECIAL.sub("", text)
    tagged = _TAGGED.findall(text)
    return (tagged[-1] if tagged else text).strip()


@lru_cache(maxsize=256)
def open_task(name: str, config: str, level: int | None = None, seed: int = 0, size: int = 1) -> Any:
    """A task as reasoning_gym's ``ProceduralDataset``.

    Args:
        name: Of the task.
        config: Its settings, as JSON.
        level: Of the task's curriculum, from 0; None: its default difficulty, or as ``config`` says.
        seed: Of the first prompt; prompt i has seed + i.
        size: Number of prompts.

    Raises:
        UserError: The package is not installed, it has no such task, or the task no such settings or no levels.
    """
    tasks, curricula = _registry()
    if name not in tasks:
        near = get_close_matches(name, tasks, 1)
        raise UserError(f"reasoning_gym has no task {name!r}{f'; did you mean {near[0]!r}?' if near else ''}")
    settings = {**json.loads(config), "seed": seed, "size": size}
    kind, make_config = tasks[name]
    try:
        if level is None:
            return kind(config=make_config(**settings))
        if name not in curricula:
            raise UserError(f"reasoning_gym task {name!r} has no levels; leave `levels` out")
        curriculum = curricula[name]()
        curriculum.set_global_level(level)
        return kind(config=curriculum.generate_configuration(settings))
    except (TypeError, ValueError, AssertionError) as error:
        raise UserError(f"reasoning_gym task {name!r} with {settings}: {error}") from error


def _registry() -> tuple[Mapping[str, Any], Mapping[str, Any]]:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", SyntaxWarning)  # of a package that it imports
            import reasoning_gym  # noqa: F401 - importing it fills the registry
            from reasoning_gym.factory import CURRICULA, DATASETS
    except ModuleNotFoundError as error:
        raise UserError(
            f"reasoning_gym tasks need the package reasoning-gym: pip install reasoning-gym ({error})"
        ) from error
    return DATASETS, CURRICULA


def _tuples(value: Any) -> Any:
    if isinstance(value, list):
        return tuple(_tuples(item) for item in value)
    return {key: _tuples(item) for key, item in value.items()} if isinstance(value, dict) else value
