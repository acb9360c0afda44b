"""What an evaluation gives: the results of each set, its answers as files, and tables of both.

::

    evaluation/step_000012.json              results of all sets, with intervals and how they were sampled
    evaluation/aime24/step_000012.jsonl      every answer, one line each
    evaluation/results.md                    a table of all evaluations in the folder
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from rich.table import Table

from megatron_vespo.algorithms.accuracy import RESAMPLES, Estimate, estimate_means, powers_up_to, problem_values
from megatron_vespo.files import atomic_write
from megatron_vespo.types import FINISH_LENGTH, IntArray, Sample, SampleGroup

_NOT_A_STEP = math.inf


@dataclass(frozen=True, slots=True)
class Scoring:
    """How answers become results.

    Attributes:
        correct_from: A response with at least this reward is correct, for pass@k.
        confidence: Of the intervals.
    """

    correct_from: float = 1.0
    confidence: float = 0.95

    @property
    def method(self) -> str:
        """The intervals in words."""
        return f"{self.confidence:.0%} percentile bootstrap over problems, {RESAMPLES} resamples, seed 0"


@dataclass(frozen=True, slots=True)
class SetResult:
    """One set.

    Attributes:
        problems: Number of prompts.
        samples_per_prompt: k of avg@k: responses to each.
        average: avg@k: mean reward over problems and their responses. One that could not be scored counts as 0.
        passes: pass@k by k, unbiased.
        reward_failed_share: Share of responses that could not be scored.
        response_length_mean: Tokens.
        truncated_share: Share of responses cut at the length limit.
    """

    problems: int
    samples_per_prompt: int
    average: Estimate
    passes: dict[int, Estimate]
    reward_failed_share: float
    response_length_mean: float
    truncated_share: float


def score_set(groups: Sequence[SampleGroup], scoring: Scoring) -> SetResult:
    """Results of a set's answers, of which every prompt has equally many."""
    samples = [sample for group in groups for sample in group.samples]
    per_prompt = len(groups[0].samples)
    ks = powers_up_to(per_prompt)
    rewards = [[0.0 if s.reward_error else s.reward for s in group.samples] for group in groups]
    average, *passes = estimate_means(problem_values(rewards, scoring.correct_from, ks), confidence=scoring.confidence)
    return SetResult(
        len(groups),
        per_prompt,
        average,
        dict(zip(ks, passes, strict=True)),
        float(np.mean([bool(sample.reward_error) for sample in samples])),
        float(np.mean([len(sample.response_ids) for sample in samples])),
        float(np.mean([sample.finish_reason == FINISH_LENGTH for sample in samples])),
    )


def set_metrics(name: str, result: SetResult) -> dict[str, float | None]:
    """The ``eval/<set>/...`` metrics."""
    estimates = {"accuracy": result.average, **{f"pass_at_{k}": value for k, value in result.passes.items()}}
    values: dict[str, float | None] = {}
    for field, estimate in estimates.items():
        values |= {field: estimate.value, f"{field}_low": estimate.low, f"{field}_high": estimate.high}
    for field in ("reward_failed_share", "response_length_mean", "truncated_share"):
        values[field] = getattr(result, field)
    return {f"eval/{name}/{field}": value for field, value in values.items()}


class EvaluationSink:
    """Writes evaluations into a folder. Files appear when they are complete.

    Args:
        folder: Made at the first one.
        decode: Prompt token ids to text.
        keep_answers: Whether answers are written.
    """

    def __init__(self, folder: Path, decode: Callable[[IntArray], str], keep_answers: bool = True) -> None:
        self._folder, self._decode, self._keep_answers = folder, decode, keep_answers

    def write_answers(self, label: str, name: str, groups: Sequence[SampleGroup]) -> None:
        """Every answer to a set."""
        if not self._keep_answers:
            return
        lines = []
        for group in groups:
            prompt = self._decode(group.prompt.input_ids)
            for sample in group.samples:
                record = _answer(prompt, sample)
                lines.append(json.dumps(record, ensure_ascii=False, allow_nan=False) + "\n")
        (self._folder / name).mkdir(parents=True, exist_ok=True)
        atomic_write(self._folder / name / f"{label}.jsonl", "".join(lines))

    def write_results(
        self,
        label: str,
        results: Mapping[str, SetResult],
        sampling: Mapping[str, Mapping[str, Any]],
        scoring: Scoring,
        facts: Mapping[str, Any],
    ) -> None:
        """The results of all sets, and the table of all evaluations here.

        Args:
            label: Name of the evaluation.
            results: By set.
            sampling: How each set was sampled.
            scoring: How results were made.
            facts: What else there is to say: step, model.
        """
        sets = {
            name: {**asdict(result), "correct_from": scoring.correct_from, "sampling": dict(sampling[name])}
            for name, result in results.items()
        }
        record = {"label": label, "time": round(time.time(), 3), **facts, "intervals": scoring.method, "sets": sets}
        self._folder.mkdir(parents=True, exist_ok=True)
        text = json.dumps(record, ensure_ascii=False, indent=1, allow_nan=False) + "\n"
        atomic_write(self._folder / f"{label}.json", text)
        atomic_write(self._folder / "results.md", markdown_table(read_results(self._folder)))


def _answer(prompt: str, sample: Sample) -> dict[str, Any]:
    return {
        "prompt_index": sample.prompt.index,
        "sample": sample.index,
        "prompt": prompt,
        "response": sample.text,
        "label": sample.prompt.label,
        "reward": sample.reward if math.isfinite(sample.reward) else None,
        "reward_error": sample.reward_error,
        "length": len(sample.response_ids),
        "finish_reason": sample.finish_reason,
    }


def read_results(folder: Path) -> list[dict[str, Any]]:
    """What :meth:`EvaluationSink.write_results` wrote: those of steps in their order, then the others by name."""
    records = [json.loads(path.read_text(encoding="utf-8")) for path in folder.glob("*.json")]
    return sorted(records, key=lambda record: (record.get("step", _NOT_A_STEP), record["label"]))


def table_rows(records: Sequence[Mapping[str, Any]]) -> list[list[str]]:
    """Header and one row for each set of each evaluation, as text."""
    rows = [["evaluation", "set", "problems", "avg@k", "pass@k", "length", "cut", "not scored"]]
    for record in records:
        for name, result in record["sets"].items():
            passes = [f"@{k} {_interval(estimate)}" for k, estimate in result["passes"].items() if int(k) > 1]
            rows.append(
                [
                    record["label"],
                    name,
                    str(result["problems"]),
                    f"@{result['samples_per_prompt']} {_interval(result['average'])}",
                    ", ".join(passes) or "-",
                    f"{result['response_length_mean']:.0f}",
                    f"{result['truncated_share']:.1%}",
                    f"{result['reward_failed_share']:.1%}",
                ]
            )
    return rows


def markdown_table(records: Sequence[Mapping[str, Any]]) -> str:
    """The table as Markdown, with how the intervals were made."""
    header, *rows = table_rows(records)
    lines = [header, ["---"] * len(header), *rows]
    methods = sorted({record["intervals"] for record in records})
    table = "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines)
    return f"# Evaluations\n\n{table}\n\nIn brackets: {'; '.join(methods)}.\n"


def console_table(record: Mapping[str, Any]) -> Table:
    """One evaluation for a terminal, narrow enough for 80 columns however many k there are."""
    table = Table("set", "answers", "score", title=record["label"], caption=f"in brackets: {record['intervals']}")
    for name, result in record["sets"].items():
        n = result["samples_per_prompt"]
        scores = [
            ("avg", n, result["average"]),
            *(("pass", int(k), e) for k, e in result["passes"].items() if int(k) > 1),
        ]
        table.add_row(
            name,
            f"{result['problems']} problems x {n}\nlength {result['response_length_mean']:.0f} tokens\n"
            f"cut {result['truncated_share']:.1%}\nnot scored {result['reward_failed_share']:.1%}",
            "\n".join(f"{f'{what}@{k}':8} {_interval(estimate)}" for what, k, estimate in scores),
            end_section=True,
        )
    return table


def _interval(estimate: Mapping[str, float]) -> str:
    return f"{estimate['value']:.3f} [{estimate['low']:.3f}, {estimate['high']:.3f}]"
