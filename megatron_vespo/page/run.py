"""What the page needs of one run's folder, as far as it can be read; what cannot is named."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from megatron_vespo.errors import UserError
from megatron_vespo.metrics.records import Records, parse_line, read_metrics
from megatron_vespo.page.evaluations import Result, read_evaluations
from megatron_vespo.run_folder import CONFIG_FILE

MAX_FINDINGS = 200


@dataclass
class Run:
    """One run.

    Attributes:
        folder: Where it is.
        records: Its metrics.
        config: Its settings, flat: ``training.steps`` -> 40.
        findings: Warnings of the health panel, with ``step`` and ``text``, the last ones.
        evaluations: Held-out results.
        notes: What could not be read, in words.
    """

    folder: Path
    records: Records = field(default_factory=lambda: Records([], [], [], 0))
    config: dict[str, Any] = field(default_factory=dict)
    findings: list[dict[str, Any]] = field(default_factory=list)
    evaluations: list[Result] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


def read_run(folder: Path) -> Run:
    """Read a run's folder, also of one that is going on or was cut short.

    Raises:
        UserError: There is no such folder, or nothing of a run in it.
    """
    if not folder.is_dir():
        raise UserError(f"there is no run folder {folder}")
    if not (folder / CONFIG_FILE).is_file() and not (folder / "metrics.jsonl").is_file():
        raise UserError(f"{folder} has neither {CONFIG_FILE} nor metrics.jsonl: it is not a run's folder")
    run = Run(folder)
    try:
        run.records = read_metrics(folder / "metrics.jsonl")
    except UserError:
        run.notes.append("there is no metrics.jsonl yet")
    if run.records.unreadable_lines:
        run.notes.append(f"metrics.jsonl: {run.records.unreadable_lines} unreadable lines were left out")
    try:
        run.config = dict(_flat(yaml.safe_load((folder / CONFIG_FILE).read_text(encoding="utf-8"))))
    except (OSError, UnicodeDecodeError, yaml.YAMLError, AttributeError) as error:
        run.notes.append(f"{CONFIG_FILE} could not be read ({type(error).__name__})")
    run.findings = _findings(folder / "health" / "warnings.jsonl", run.notes)[-MAX_FINDINGS:]
    run.evaluations = read_evaluations(folder / "evaluation", run.notes)
    ending = folder / "logs" / "error.txt"
    if ending.is_file():
        run.notes.append("the run ended with an error: " + ending.read_text("utf-8", "replace").strip()[:400])
    return run


def _findings(path: Path, notes: list[str]) -> list[dict[str, Any]]:
    """Warnings of a file that may not be there. Lines that are none are counted in a note."""
    try:
        lines = path.read_text(encoding="utf-8", errors="replace").split("\n") if path.is_file() else []
    except OSError as error:
        notes.append(f"{path.name} could not be read: {error.strerror}")
        return []
    records = [parse_line(line) for line in lines if line.strip()]
    found = [{"step": r["step"], "text": r["text"]} for r in records if r and isinstance(r.get("text"), str)]
    if len(found) < len(records):
        notes.append(f"{path.name}: {len(records) - len(found)} unreadable lines were left out")
    return found


def _flat(tree: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in tree.items():
        if isinstance(value, dict) and value:
            yield from _flat(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value
