"""Published sets into training and evaluation files without duplicates and without evaluation problems in training."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from megatron_vespo.data.overlap import NGRAM, OVERLAP, HeldOut, normalise
from megatron_vespo.data.published import FORMATS, Problem, read_published
from megatron_vespo.errors import UserError

INSTRUCTIONS = {
    "math": "{problem}\n\nPlease reason step by step, and put your final answer within \\boxed{}.",
    "code": "{problem}",
}
"""What a prompt says, by the kind of the set; Eurus' problems bring their own instructions."""


@dataclass(frozen=True, slots=True)
class Rules:
    """How problems are compared and written.

    Attributes:
        instructions: By kind, with ``{problem}`` in it.
        ngram: See :mod:`megatron_vespo.data.overlap`.
        overlap: See there.
    """

    instructions: dict[str, str] = field(default_factory=lambda: dict(INSTRUCTIONS))
    ngram: int = NGRAM
    overlap: float = OVERLAP


@dataclass(slots=True)
class Outcome:
    """What became of the problems.

    Attributes:
        rows: By set: how many were read, kept, and dropped for which reason.
        dropped: Each problem dropped, but for repetitions with the same answer.
    """

    rows: dict[str, dict[str, int]] = field(default_factory=dict)
    dropped: list[dict[str, Any]] = field(default_factory=list)

    def count(self, name: str, what: str) -> None:
        """One more."""
        counts = self.rows.setdefault(
            name, dict.fromkeys(("read", "kept", "repeated", "contradictory", "in_evaluation", "unusable"), 0)
        )
        counts[what] += 1

    def drop(self, name: str, reason: str, where: str, **facts: Any) -> None:
        """One more dropped, for the report."""
        self.count(name, reason)
        self.dropped.append({"set": name, "reason": reason, "where": where, **facts})


def prepare(
    train: Sequence[tuple[str, Path]], evaluation: Sequence[tuple[str, Path]], output: Path, rules: Rules | None = None
) -> Outcome:
    """Write ``<set>.jsonl`` of each set, ``dropped.jsonl`` and ``report.json`` into the folder ``output``.

    A problem that occurs again, in whatever training set, is kept once; with different answers it is dropped
    altogether. A training problem that is one of the evaluation's is dropped.

    Args:
        train: (format, path) of each training set, in order: of repetitions the first is kept.
        evaluation: (format, path) of each evaluation set.
        output: Made if need be.
        rules: How.

    Raises:
        UserError: A set is twice there, or as :func:`read_published`; nothing is written then.
    """
    rules = rules or Rules()
    names = [name for name, _ in (*train, *evaluation)]
    if twice := {name for name in names if names.count(name) > 1}:
        raise UserError(f"{', '.join(sorted(twice))}: a format can be given once; gsm8k's splits are different files")
    outcome = Outcome()
    held = {name: _unique([(name, path)], "test", outcome)[name] for name, path in evaluation}
    named = ((f"{name}/{p.metadata['id']}", p.text) for name, problems in held.items() for p in problems)
    held_out = HeldOut(named, rules.ngram, rules.overlap)
    kept = _unique(train, "train", outcome)
    sets = {name: _without(held_out, name, problems, outcome) for name, problems in kept.items()} | held
    output.mkdir(parents=True, exist_ok=True)
    for name, problems in sets.items():
        for _ in problems:
            outcome.count(name, "kept")
        _write(
            output / f"{name}.jsonl", [_row(problem, rules.instructions[FORMATS[name].kind]) for problem in problems]
        )
    _write(output / "dropped.jsonl", outcome.dropped)
    report = {
        "train": {name: str(path) for name, path in train},
        "evaluation": {name: str(path) for name, path in evaluation},
        "ngram": rules.ngram,
        "overlap": rules.overlap,
        "problems": outcome.rows,
    }
    (output / "report.json").write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    return outcome


@dataclass(slots=True)
class _Found:
    """A problem where it occurred first, and all the answers that it was given."""

    name: str
    problem: Problem
    answers: set[str]


def _unique(sets: Sequence[tuple[str, Path]], split: str, outcome: Outcome) -> dict[str, list[Problem]]:
    """Each problem of these sets once, none with several answers. A set may be much larger than what is kept of it."""
    found: dict[str, _Found] = {}
    for name, path in sets:
        usable = 0
        for problem in _read(name, path, split, outcome):
            usable += 1
            before = found.setdefault(normalise(problem.text), _Found(name, problem, set()))
            before.answers.add(problem.label)
            if before.problem is not problem:
                outcome.count(name, "repeated")
        if not usable:
            raise UserError(f"{path}: not one usable problem of {name}")
    kept: dict[str, list[Problem]] = {name: [] for name, _ in sets}
    for one in found.values():
        if len(one.answers) > 1:
            facts = {"answers": sorted(one.answers), "problem": one.problem.text}
            outcome.drop(one.name, "contradictory", one.problem.where, **facts)
        else:
            kept[one.name].append(one.problem)
    return kept


def _read(name: str, path: Path, split: str, outcome: Outcome) -> Iterator[Problem]:
    def unusable(where: str, why: str) -> None:
        outcome.count(name, "read")
        outcome.drop(name, "unusable", where, why=why)

    for problem in read_published(name, path, split, unusable):
        outcome.count(name, "read")
        yield problem


def _without(held_out: HeldOut, name: str, problems: list[Problem], outcome: Outcome) -> list[Problem]:
    kept = []
    for problem in problems:
        found = held_out.find(problem.text)
        if found is None:
            kept.append(problem)
        else:
            facts = {"same_as": found[0], "overlap": round(found[1], 3), "problem": problem.text}
            outcome.drop(name, "in_evaluation", problem.where, **facts)
    return kept


def _row(problem: Problem, instruction: str) -> dict[str, Any]:
    content = instruction.replace("{problem}", problem.text)
    return {
        "prompt": [{"role": "user", "content": content}],
        "label": problem.label,
        "metadata": problem.metadata,
    }


def _write(file: Path, rows: list[dict[str, Any]]) -> None:
    file.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
