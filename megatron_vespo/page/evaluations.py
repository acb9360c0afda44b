"""Held-out results of a run's ``evaluation/``, as the rows of a table."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_vespo.algorithms.accuracy import Estimate
from megatron_vespo.metrics.records import is_finite


@dataclass(frozen=True, slots=True)
class Result:
    """One number of an evaluation.

    Attributes:
        label: Name of the evaluation: ``step_000012``, or what ``evaluate`` called it.
        step: Of training; None of one that ``evaluate`` made.
        set: What was evaluated.
        measure: ``avg@4`` or ``pass@4``.
        problems: In the set.
        estimate: The value with its interval.
        method: How the intervals were made.
    """

    label: str
    step: int | None
    set: str
    measure: str
    problems: int
    estimate: Estimate
    method: str

    def shown(self) -> dict[str, Any]:
        """What the page shows of it in a row that names set and measure."""
        value, low, high = (round(float(x), 6) for x in (self.estimate.value, self.estimate.low, self.estimate.high))
        return {"label": self.label, "step": self.step, "value": value, "low": low, "high": high}


def read_evaluations(folder: Path, notes: list[str]) -> list[Result]:
    """All results in ``evaluation/``. A file that is damaged is named in a note."""
    found: list[Result] = []
    for path in sorted(folder.glob("*.json")):
        try:
            found += list(_results(json.loads(path.read_text(encoding="utf-8"))))
        except (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
            notes.append(f"evaluation/{path.name} could not be read ({type(error).__name__})")
    return found


def _results(record: dict[str, Any]) -> Iterator[Result]:
    step = record.get("step")
    for name, result in record["sets"].items():
        passes = {f"pass@{int(k)}": value for k, value in result["passes"].items() if int(k) > 1}
        for measure, value in {f"avg@{int(result['samples_per_prompt'])}": result["average"], **passes}.items():
            numbers = value["value"], value["low"], value["high"]
            if not all(map(is_finite, numbers)) or not (step is None or is_finite(step)):
                raise ValueError("a result is no number")
            problems, method = int(result["problems"]), str(record["intervals"])
            yield Result(str(record["label"]), step, name, measure, problems, Estimate(*numbers), method)


def evaluation_tables(runs: list[list[Result]]) -> dict[str, Any]:
    """What the page shows: of each measure of each run first, last and best step; then what has no step.

    Rows are in the order of sets, then measures, then runs, so that runs stand beside each other.
    """
    of_steps, others, methods = [], [], set()
    for name, measure in dict.fromkeys((r.set, r.measure) for run in runs for r in run):
        for place, run in enumerate(runs):
            results = [r for r in run if (r.set, r.measure) == (name, measure)]
            row = {"run": place, "set": name, "measure": measure}
            ordered = sorted((r for r in results if r.step is not None), key=lambda r: r.step or 0)
            if ordered:
                best = max(ordered, key=lambda r: r.estimate.value)
                shown = {"first": ordered[0].shown(), "last": ordered[-1].shown(), "best": best.shown()}
                of_steps.append({**row, "problems": ordered[-1].problems, **shown})
            others += [{**row, "problems": r.problems, "only": r.shown()} for r in results if r.step is None]
            methods |= {r.method for r in results}
    return {"steps": of_steps, "others": others, "methods": sorted(methods)}
