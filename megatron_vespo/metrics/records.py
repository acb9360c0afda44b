"""Reading ``metrics.jsonl`` back."""

from __future__ import annotations

import json
import math
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_vespo.errors import UserError


@dataclass(frozen=True, slots=True)
class Records:
    """The metrics of a run, a record a step.

    Attributes:
        steps: Ascending step numbers; step 0 holds what was measured before training.
        values: The finite metrics of each step, parallel to ``steps``.
        times: Unix time each step was written, parallel to ``steps``; NaN where the line has none.
        unreadable_lines: Lines that are not a JSON object with a step, such as one cut by a crash.
    """

    steps: list[int]
    values: list[dict[str, float]]
    times: list[float]
    unreadable_lines: int

    def series(self, name: str) -> tuple[list[int], list[float]]:
        """Steps at which a metric was measured, and its values there."""
        pairs = [(step, row[name]) for step, row in zip(self.steps, self.values, strict=True) if name in row]
        return [step for step, _ in pairs], [value for _, value in pairs]

    def eval_sets(self) -> list[str]:
        """Names of the evaluation sets with an accuracy, sorted."""
        names = {name for row in self.values for name in row}
        return sorted(
            n[len("eval/") : -len("/accuracy")] for n in names if n.startswith("eval/") and n.endswith("/accuracy")
        )


def read_metrics(path: str | os.PathLike[str]) -> Records:
    """Read a metrics file, also of a run that is going on, was cut short or was resumed.

    Lines of one step are merged. A line whose step lies before its predecessor's means that the run was resumed from
    an earlier checkpoint: the later steps of the abandoned attempt are dropped.

    Raises:
        UserError: There is no such file.
    """
    path = Path(path)
    if not path.is_file():
        raise UserError(f"there is no metrics file {path}")
    rows: dict[int, dict[str, float]] = {}
    times: dict[int, float] = {}
    unreadable = 0
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        if not line.strip():
            continue
        record = parse_line(line)
        if record is None:
            unreadable += 1
            continue
        step = record.pop("step")
        for later in [other for other in rows if other > step]:
            del rows[later], times[later]
        times[step] = _number(record.pop("time", None))
        numbers = {name: _number(value) for name, value in record.items()}
        rows.setdefault(step, {}).update({name: value for name, value in numbers.items() if math.isfinite(value)})
    order = sorted(rows)
    return Records(order, [rows[step] for step in order], [times[step] for step in order], unreadable)


def parse_line(line: str) -> dict[str, Any] | None:
    """The JSON object of a line that has a step; None of any other line. What JSON has no number for (NaN) is None."""
    try:
        record = json.loads(line, parse_constant=lambda _: None)
    except (ValueError, RecursionError):  # also of a number of thousands of digits
        return None
    return (
        record if isinstance(record, dict) and type(record.get("step")) is int and is_finite(record["step"]) else None
    )


def is_finite(value: object) -> bool:
    """Whether it is a number that a float can hold, of whatever size it was written."""
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) <= sys.float_info.max


def mean(values: Sequence[float]) -> float | None:
    """Arithmetic mean; None of nothing."""
    return math.fsum(values) / len(values) if values else None


def _number(value: object) -> float:
    return float(value) if isinstance(value, int | float) and is_finite(value) else math.nan
