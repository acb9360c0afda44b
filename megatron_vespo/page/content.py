"""Everything that the page shows, as one JSON value."""

from __future__ import annotations

import math
import time
from pathlib import Path
from typing import Any

from megatron_vespo.metrics.records import mean
from megatron_vespo.metrics.registry import PHASES
from megatron_vespo.page.charts import MAX_POINTS, SECTIONS, charts_of
from megatron_vespo.page.evaluations import evaluation_tables
from megatron_vespo.page.run import Run, read_run
from megatron_vespo.page.samples import read_samples

# Steps that the facts of a run are averaged over.
RECENT = 10


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
        "phases": list(PHASES),
        "time_split": [_time_split(place, run) for place, run in enumerate(runs)],
        "settings": differences([run.config for run in runs]),
        "evaluation": evaluation_tables([run.evaluations for run in runs]),
        "samples": samples,
        "left_out": left_out,
    }


def _names(runs: list[Run]) -> list[str]:
    """Folder names, with their place where two runs have the same."""
    names = [run.folder.name for run in runs]
    return [name if names.count(name) == 1 else f"{name} ({place})" for place, name in enumerate(names, 1)]


def _head(run: Run, name: str) -> dict[str, Any]:
    total = run.config.get("training.steps")
    total = total if isinstance(total, int) else None
    head = {"name": name, "folder": str(run.folder), "done": max(run.records.steps, default=0), "total": total}
    return {**head, "facts": _facts(run), "findings": run.findings, "notes": run.notes}


def _facts(run: Run) -> dict[str, str | float]:
    """What tells a run from others at a glance."""
    named = {"model": "model.hf_path", "method": "algorithm.kernel", "seed": "run.seed"}
    facts: dict[str, str | float] = {label: str(run.config[key]) for label, key in named.items() if key in run.config}
    recent = {"reward": "rollout/reward_mean", "seconds a step": "perf/step_time"}
    for label, name in recent.items():
        value = mean(run.records.series(name)[1][-RECENT:])
        if value is not None:
            facts[f"{label}, last {RECENT} steps"] = value
    written = [moment for moment in run.records.times if math.isfinite(moment)]
    if written:
        facts["last step written"] = _clock(max(written))
    return facts


def _clock(seconds: float) -> str:
    try:
        return time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(seconds))
    except (OverflowError, OSError, ValueError):  # no moment of any year
        return "?"


def differences(configs: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Settings that are not the same in all runs; None where a run has no such key. Of one run: none."""
    keys = sorted({key for config in configs for key in config})
    rows = [{"key": key, "values": [_text(config.get(key)) for config in configs]} for key in keys]
    return [row for row in rows if len(set(row["values"])) > 1]


def _text(value: Any) -> str | None:
    return None if value is None else str(value)


def _time_split(place: int, run: Run) -> dict[str, Any]:
    """Share of the time of all steps by phase; of a run without times none."""
    whole = sum(run.records.series("perf/step_time")[1])
    seconds = {name: sum(run.records.series(f"perf/{name}_time")[1]) for name in PHASES}
    return {"run": place, "phases": {name: value / whole for name, value in seconds.items() if whole and value}}
