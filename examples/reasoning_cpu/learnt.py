"""What a run learnt, in a few lines: its evaluations before and after, answers that became right, and where to look.

python -m examples.reasoning_cpu.learnt runs/reasoning
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from megatron_vespo.metrics.evaluations import read_results

WORDS = 3
"""Answers that are shown of each set."""
PLACES = (
    ("report.html", "the run on one page, for a browser: curves, off-policy health, samples token by token"),
    ("evaluation/results.md", "every evaluation with its intervals; all answers are beside it"),
    ("summary.md", "the run as a table"),
    ("hf/latest", "the trained model, a Hugging Face folder"),
)


def describe(run: Path) -> Iterator[str]:
    """The lines."""
    folder = run / "evaluation"
    evaluations = [record for record in read_results(folder) if "step" in record]
    before, after = evaluations[0], evaluations[-1]
    yield f"What was learnt in {after['step']} steps, on held-out prompts (in brackets: {after['intervals']}):"
    for name, result in after["sets"].items():
        start, k = before["sets"][name], str(result["samples_per_prompt"])
        yield f"  {name:6} avg@{k}   {_interval(start['average'])} before, {_interval(result['average'])} after"
        yield f"  {name:6} pass@{k}  {_interval(start['passes'][k])} before, {_interval(result['passes'][k])} after"
    became_right = [line for name in after["sets"] for line in _became_right(folder / name, before, after)]
    if became_right:
        yield "Answers that became right:"
        yield from became_right
    yield "Where to look:"
    for place, what in PLACES:
        yield f"  {run / place}: {what}"


def _became_right(folder: Path, before: Mapping[str, Any], after: Mapping[str, Any]) -> list[str]:
    was, now = (_first_answers(folder / f"{record['label']}.jsonl") for record in (before, after))
    chosen = [index for index in now if now[index]["reward"] == 1 and was[index]["reward"] != 1][:WORDS]
    return [f"  {now[k]['prompt']}  {_response(was[k])} before, {_response(now[k])} after" for k in chosen]


def _interval(estimate: Mapping[str, float]) -> str:
    return f"{estimate['value']:.3f} [{estimate['low']:.3f}, {estimate['high']:.3f}]"


def _first_answers(path: Path) -> dict[int, dict[str, Any]]:
    """The first answer to each prompt."""
    answers = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    return {answer["prompt_index"]: answer for answer in answers if answer["sample"] == 0}


def _response(answer: Mapping[str, Any]) -> str:
    return str(answer["response"]).removesuffix("<eos>").strip()


if __name__ == "__main__":
    print(*describe(Path(sys.argv[1])), sep="\n")
