"""What the page needs of one run's folder, as far as it can be read; what cannot is named."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from megatron_vespo.errors import UserError
from megatron_vespo.metrics.records import Records, read_metrics
from megatron_vespo.run_folder import CONFIG_FILE

# Of all runs together: samples on the page, and tokens of these.
MAX_SAMPLES, MAX_TOKENS = 1200, 150_000
# Characters of a prompt or of a response, and tokens of a response, that the page holds.
MAX_TEXT, MAX_RESPONSE_TOKENS = 8_000, 2_000
MAX_FINDINGS = 200


@dataclass
class Run:
    """One run.

    Attributes:
        folder: Where it is.
        records: Its metrics.
        config: Its settings, flat: ``training.steps`` -> 40.
        findings: Warnings of the health panel, with ``step`` and ``text``, the last ones.
        notes: What could not be read, in words.
    """

    folder: Path
    records: Records = field(default_factory=lambda: Records([], [], [], 0))
    config: dict[str, Any] = field(default_factory=dict)
    findings: list[dict[str, Any]] = field(default_factory=list)
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
    run.findings = [line for line in read_lines(folder / "health" / "warnings.jsonl", run.notes) if "text" in line]
    run.findings = run.findings[-MAX_FINDINGS:]
    ending = folder / "logs" / "error.txt"
    if ending.is_file():
        run.notes.append("the run ended with an error: " + ending.read_text("utf-8", "replace").strip()[:400])
    return run


def read_lines(path: Path, notes: list[str]) -> list[dict[str, Any]]:
    """Objects of a jsonl file that have a step; none of a file that is not there. Other lines are counted in a note."""
    try:
        lines = path.read_text(encoding="utf-8", errors="replace").split("\n") if path.is_file() else []
    except OSError as error:
        notes.append(f"{path.name} could not be read: {error.strerror}")
        return []
    found, bad = [], 0
    for line in filter(str.strip, lines):
        try:
            record = json.loads(line)
        except json.JSONDecodeError:
            record = None
        if isinstance(record, dict) and isinstance(record.get("step"), int):
            found.append(record)
        else:
            bad += 1
    if bad:
        notes.append(f"{path.name}: {bad} unreadable lines were left out")
    return found


def read_samples(runs: list[Run]) -> tuple[list[dict[str, Any]], int]:
    """Samples of all runs for the viewer and how many were left out; steps share the limits evenly."""
    files = [(place, path) for place, run in enumerate(runs) for path in _rollout_files(run)]
    # Where not even one sample a step has room: steps at equal distances, the last one among them.
    chosen = files[:: -max(1, -(-len(files) // MAX_SAMPLES))][::-1]
    share = max(1, MAX_SAMPLES // max(1, len(chosen))), MAX_TOKENS // max(1, len(chosen))
    found: list[dict[str, Any]] = []
    left_out = 0
    for place, path in files:
        if (place, path) not in chosen:
            left_out += path.read_bytes().count(b"\n")
            continue
        tokens = 0
        for number, line in enumerate(read_lines(path, runs[place].notes)):
            sample = _sample(line)
            tokens += len(sample["tokens"]["text"])
            if number >= share[0] or (number and tokens > share[1]):
                left_out += 1
            else:
                found.append({"run": place, **sample})
    return found, left_out


def _rollout_files(run: Run) -> list[Path]:
    """Steps that an earlier attempt made beyond the last one of this run are not its."""
    last = max(run.records.steps, default=0)
    names = sorted((run.folder / "rollouts").glob("step_*.jsonl"))
    return [path for path in names if path.stem[5:].isdigit() and int(path.stem[5:]) <= last]


def _sample(line: dict[str, Any]) -> dict[str, Any]:
    tokens: dict[str, Any] = line.get("tokens") or {}  # runs from before they were kept have none
    cut = {name: (tokens.get(name) or [])[:MAX_RESPONSE_TOKENS] for name in ("text", "log_mu", "log_pi", "version")}
    kept = ("step", "sample", "label", "reward", "reward_error", "advantage", "log_w", "phi", "length")
    sample = {name: line.get(name) for name in (*kept, "finish_reason", "versions", "policy_version")}
    texts = {name: str(line.get(name) or "") for name in ("prompt", "response")}
    shown = {name: text[:MAX_TEXT] for name, text in texts.items()}
    is_cut = shown != texts or len(tokens.get("text") or []) > MAX_RESPONSE_TOKENS
    return {**sample, **shown, "tokens": cut, "cut": is_cut}


def _flat(tree: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in tree.items():
        if isinstance(value, dict) and value:
            yield from _flat(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value
