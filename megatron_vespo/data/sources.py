"""From the configuration to prompts: each source's rows, the data set of them all, and the stages of a curriculum."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from typing import Any

import numpy as np

from megatron_vespo.config import DataSection, SourceSection
from megatron_vespo.config.data import SPLITS, CurriculumSection, StageSection
from megatron_vespo.data import reasoning
from megatron_vespo.data.order import Stage
from megatron_vespo.data.prompts import PromptDataset, PromptForm, PromptRecord, Source, read_prompts
from megatron_vespo.data.rows import Row, look_up, read_rows, rows_of_function
from megatron_vespo.data.sft import SupervisedExample, make_supervised
from megatron_vespo.data.tokenizer import Tokenizer
from megatron_vespo.errors import UserError


def read_training(
    data: DataSection,
    tokenizer: Tokenizer,
    limit: int,
    held_out: Mapping[str, PromptDataset] | None = None,
    announce: Callable[[str], None] = lambda text: None,
) -> PromptDataset:
    """All training prompts of at most ``limit`` tokens; ``announce`` is told how many were left out.

    A task of reasoning_gym, or a function, may make a prompt of ``held_out`` again; it is left out too.

    Raises:
        UserError: as :func:`megatron_vespo.data.rows.read_rows` and :func:`read_prompts`.
    """
    known = {record.input_ids.tobytes() for dataset in (held_out or {}).values() for record in dataset.records}
    sources = []
    for name, section in data.train_sources.items():
        source = _told(read_source(name, section, data, tokenizer, limit), limit, announce)
        if section.path is None:
            source = _without(source, known, announce)
        sources.append(source)
    return PromptDataset.of(sources)


def read_evaluation(
    data: DataSection,
    tokenizer: Tokenizer,
    limit_of: Callable[[str], int],
    announce: Callable[[str], None] = lambda text: None,
) -> dict[str, PromptDataset]:
    """The evaluation sets by name, each with a limit of tokens of its own. Raises as :func:`read_training`."""
    sets = {}
    for name, source in data.evaluation_sources.items():
        limit = limit_of(name)
        found = read_source(name, source, data, tokenizer, limit, "evaluation")
        sets[name] = PromptDataset.of([_told(found, limit, announce)])
    return sets


def read_texts(
    data: DataSection, tokenizer: Tokenizer, limit: int, announce: Callable[[str], None] = lambda text: None
) -> tuple[list[SupervisedExample], list[Stage]]:
    """Texts to learn, all sources one after the other, and how the sources are mixed.

    What was made for an evaluation set, and not read from a file, is left out. Raises as
    :func:`megatron_vespo.data.sft.make_supervised`.
    """
    known = {
        json.dumps(row.get("prompt"))
        for source in data.evaluation_sources.values()
        if source.path is None
        for _, row in rows_of(source)
    }
    examples: list[SupervisedExample] = []
    members, weights = [], []
    for name, source in data.train_sources.items():
        rows = rows_of(source)
        if source.path is None:
            rows = ((where, row) for where, row in rows if json.dumps(row.get("prompt")) not in known)
        found, dropped = make_supervised(rows, tokenizer, limit, form_of(source, data))
        if not found:
            raise UserError(f"data.train: nothing of {name} is left: {dropped} texts are longer than {limit} tokens")
        if dropped:
            announce(f"{name}: left out {dropped} of {dropped + len(found)} texts, longer than {limit} tokens")
        members.append(np.arange(len(examples), len(examples) + len(found)))
        weights.append(source.weight or float(len(found)))
        examples += found
    return examples, [Stage(members, weights)]


def read_source(
    name: str, source: SourceSection, data: DataSection, tokenizer: Tokenizer, limit: int, purpose: str = "train"
) -> Source:
    """One source; ``purpose`` (train or evaluation) chooses the split where none is named."""
    form = form_of(source, data)
    records, dropped = read_prompts(rows_of(source, purpose), tokenizer, limit, form)
    return Source(name, records, source.weight, dropped)


def rows_of(source: SourceSection, purpose: str = "train") -> Iterator[Row]:
    """The rows of a source."""
    if source.reasoning_gym is not None:
        return reasoning.rows(source.reasoning_gym)
    if source.function is not None:
        return rows_of_function(source.function, source.arguments)
    assert source.path is not None
    return read_rows(source.path, source.subset, source.split, SPLITS[purpose])


def form_of(source: SourceSection, data: DataSection) -> PromptForm:
    """How this source's rows become prompts: its own settings before those of all data."""
    return PromptForm(
        keys={**data.keys, **source.keys},
        chat=data.chat if source.chat is None else source.chat,
        system_prompt=data.system_prompt if source.system_prompt is None else source.system_prompt,
        template_kwargs=data.template_kwargs,
        long_prompts=data.long_prompts,
    )


def make_stages(dataset: PromptDataset, curriculum: CurriculumSection | None) -> list[Stage]:
    """What is drawn when. Without a curriculum there is one stage, with everything.

    Raises:
        UserError: No prompt has the curriculum's field, one has something else than a number in it, or there is none
            for a stage.
    """
    ends = np.cumsum([len(source.records) for source in dataset.sources])
    weights = [float(source.weight or len(source.records)) for source in dataset.sources]
    whole = [np.arange(end - len(source.records), end) for end, source in zip(ends, dataset.sources, strict=True)]
    if curriculum is None:
        return [Stage(whole, weights)]
    difficulty = np.array([_difficulty(record, curriculum.field) for record in dataset.records])
    if np.isnan(difficulty).all():
        raise UserError(f"data.curriculum.field: no training prompt has {curriculum.field!r} in its metadata")
    stages = []
    for number, section in enumerate(curriculum.stages):
        chosen = _in_stage(difficulty, section)
        if not chosen.any():
            raise UserError(
                f"data.curriculum.stages: no training prompt belongs to stage {number + 1}; {curriculum.field} is"
                f" {np.nanmin(difficulty):g} to {np.nanmax(difficulty):g}"
            )
        stages.append(Stage([members[chosen[members]] for members in whole], weights, section.prompts))
    return stages


def _in_stage(difficulty: Any, section: StageSection) -> Any:
    low = -np.inf if section.at_least is None else section.at_least
    high = np.inf if section.at_most is None else section.at_most
    return np.isnan(difficulty) | ((difficulty >= low) & (difficulty <= high))


def _difficulty(record: PromptRecord, key: str) -> float:
    value = look_up(record.metadata, key)
    if value is None:
        return float("nan")
    try:
        return float(value)
    except (TypeError, ValueError) as error:
        raise UserError(
            f"data.curriculum.field: {key!r} of a training prompt is {value!r}, which is no number"
        ) from error


def _told(source: Source, limit: int, announce: Callable[[str], None]) -> Source:
    if source.dropped:
        total = source.dropped + len(source.records)
        announce(f"{source.name}: left out {source.dropped} of {total} prompts, longer than {limit} tokens")
    return source


def _without(source: Source, known: set[bytes], announce: Callable[[str], None]) -> Source:
    records = [record for record in source.records if record.input_ids.tobytes() not in known]
    if not records:
        raise UserError(
            f"data.train: every prompt of {source.name} is an evaluation prompt too; its source makes too few"
        )
    if len(records) < len(source.records):
        announce(f"{source.name}: left out {len(source.records) - len(records)} prompts that evaluation has too")
    return replace(source, records=records)
