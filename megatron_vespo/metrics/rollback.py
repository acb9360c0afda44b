"""Before a run is resumed: what it wrote after the checkpoint's step is taken back, as it will be written again."""

from __future__ import annotations

import json
import re
from pathlib import Path

from megatron_vespo.files import atomic_write

_OF_A_STEP = re.compile(r"(step|batch)_(\d+)\.(jsonl|json|msgpack)")


def roll_back(run_folder: Path, step: int) -> None:
    """Drop lines and files of steps after ``step``: metrics, rollouts, evaluations, and what the health panel wrote.

    Lines that are cut or damaged are dropped too: only a crash while writing leaves one, at the end.
    """
    for file in (run_folder / "metrics.jsonl", run_folder / "health" / "warnings.jsonl"):
        if file.is_file():
            lines = file.read_text(encoding="utf-8", errors="replace").splitlines(keepends=True)
            kept = [line for line in lines if line.endswith("\n") and _step_of(line, step + 1) <= step]
            if kept != lines:
                atomic_write(file, "".join(kept))
    places = ("rollouts/*", "health/*", "evaluation/*", "evaluation/*/*")
    for path in (path for place in places for path in run_folder.glob(place)):
        match = _OF_A_STEP.fullmatch(path.name)
        if match and int(match[2]) > step:
            path.unlink()


def _step_of(line: str, otherwise: int) -> int:
    try:
        return int(json.loads(line)["step"])
    except (ValueError, KeyError, TypeError):
        return otherwise
