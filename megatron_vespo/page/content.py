"""Everything that the page shows, as one JSON value."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

from megatron_vespo.metrics.registry import PHASES
from megatron_vespo.page.charts import MAX_POINTS, SECTIONS, charts_of
from megatron_vespo.page.run import Run, read_run, read_samples


def content_of(folders: list[Path]) -> dict[str, Any]:
    """Read the runs.

    Raises:
        UserError: A folder is not a run's.
    """
    runs = [read_run(folder.resolve()) for folder in folders]
    samples, left_out = read_samples(runs)
    return {
        "written": time.strftime("%Y-%m-%d %H:%M:%S"),
        "runs": [_head(run, name) for run, name in zip(runs, _names(runs), strict=True)],
        "sections": SECTIONS,
        "max_points": MAX_POINTS,
        "charts": charts_of([run.records for run in runs]),
        "time_split": [_time_split(run) for run in runs],
        "settings": differences([run.config for run in runs]),
        "evaluation": _evaluation(runs),
        "samples": samples,
        "left_out": left_out,
    }


def _names(runs: list[Run]) -> list[str]:
    """Folder names, with their place where two runs have the same."""
    names = [run.folder.name for run in runs]
    return [name if names.count(name) == 1 else f"{name} ({place})" for place, name in enumerate(names, 1)]


def _head(run: Run, name: str) -> dict[str, Any]:
    total = run.config.get("training.steps")
    head = {"name": name, "folder": str(run.folder), "done": max(run.records.steps, default=0), "total": total}
    return {**head, "findings": run.findings, "notes": run.notes}


def differences(configs: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Settings that are not the same in all runs; None where a run has no such key. Of one run: none."""
    keys = sorted({key for config in configs for key in config})
    rows = [{"key": key, "values": [_text(config.get(key)) for config in configs]} for key in keys]
    return [row for row in rows if len(set(row["values"])) > 1]


def _text(value: Any) -> str | None:
    return None if value is None else str(value)


def _evaluation(runs: list[Run]) -> list[dict[str, Any]]:
    """First, last and best accuracy of each set in each run, with their steps."""
    rows = []
    for place, run in enumerate(runs):
        for name in run.records.eval_sets():
            points = list(zip(*run.records.series(f"eval/{name}/accuracy"), strict=True))
            best = max(points, key=lambda point: point[1])
            rows.append({"run": place, "set": name, "first": points[0], "last": points[-1], "best": best})
    return rows


def _time_split(run: Run) -> dict[str, float]:
    """Share of the time of all steps by phase."""
    whole = sum(run.records.series("perf/step_time")[1])
    seconds = {name: sum(run.records.series(f"perf/{name}_time")[1]) for name in PHASES}
    return {name: value / whole for name, value in seconds.items() if whole and value}
