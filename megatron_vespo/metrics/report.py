"""The end of a run: ``summary.md`` on one page, and ``learning_curve.png``."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path

from megatron_vespo.files import atomic_write
from megatron_vespo.metrics.console import format_seconds
from megatron_vespo.metrics.records import Records, mean, read_metrics
from megatron_vespo.metrics.registry import PHASES

# Rewards of single steps are noisy: the first and last few are averaged.
EDGE_STEPS = 5
# Warnings of the health panel that the summary repeats.
LAST_WARNINGS = 10

_HEALTH_ROWS = (
    ("mean \\|log W\\| (nats)", "log_w_abs_mean", mean),
    ("max \\|log W\\| (nats)", "log_w_abs_max", lambda values: max(values, default=None)),
    ("ESS of W", "ess_w", mean),
    ("ESS of phi", "ess_phi", mean),
    ("mean phi", "phi_mean", mean),
    ("share of phi < 0.1", "phi_small_share", mean),
)

_PLACES = (
    ("config.yaml", "configuration"),
    ("metrics.jsonl", "metrics of every step"),
    ("learning_curve.png", "learning curve"),
    ("rollouts", "samples of every step"),
    ("preflight.json", "pre-flight"),
    ("health", "warnings, and tokens whose log-probabilities differ most"),
    ("checkpoints", "checkpoints to resume from"),
    ("hf", "Hugging Face folders"),
    ("tensorboard", "TensorBoard events"),
    ("logs", "logs"),
)


def write_report(
    run_folder: str | os.PathLike[str], facts: Mapping[str, str] | None = None, total_steps: int | None = None
) -> None:
    """Write ``summary.md`` and ``learning_curve.png`` into a run's folder from its ``metrics.jsonl``.

    Works at any time, for a run that was cut short too. The picture is left out while there is nothing to draw.

    Args:
        run_folder: The run's folder; its name is the title.
        facts: What ran, as rows of the first table: model, data, algorithm, parallel layout, ...
        total_steps: Steps the run was meant to have.

    Raises:
        UserError: The folder has no ``metrics.jsonl``.
    """
    # A second of imports that only the rank that writes needs, and only now.
    from megatron_vespo.metrics.learning_curve import draw_learning_curve

    folder = Path(run_folder).resolve()
    records = read_metrics(folder / "metrics.jsonl")
    picture = draw_learning_curve(records, folder.name)
    if picture is not None:
        atomic_write(folder / "learning_curve.png", picture)
    atomic_write(folder / "summary.md", _summary(folder, records, facts or {}, total_steps))


def _summary(folder: Path, records: Records, facts: Mapping[str, str], total_steps: int | None) -> str:
    rows = [("state", _state(records, total_steps)), *facts.items(), *_size_rows(records)]
    sections = [
        f"# {folder.name}",
        _table(["what ran", ""], rows),
        _section("Result", _result(records)),
        _section("Warnings", "\n".join(f"- {text}" for text in _warnings(records) + _told(folder))),
        _section("Off-policy health", _health(records)),
        _section("Time of a step", _time_split(records)),
        _section("Where things are", "\n".join(f"- `{folder / p}`: {t}" for p, t in _PLACES if (folder / p).exists())),
    ]
    if (folder / "learning_curve.png").exists():
        sections.insert(3, "![learning curve](learning_curve.png)")
    return "\n\n".join(section for section in sections if section) + "\n"


def _state(records: Records, total_steps: int | None) -> str:
    done = max(records.steps, default=0)
    if total_steps is None:
        return f"{done} steps done"
    return f"finished, {done} steps" if done >= total_steps else f"stopped after step {done} of {total_steps}"


def _size_rows(records: Records) -> list[tuple[str, str]]:
    rows = []
    for title, name, unit in (("trained on", "train/samples", "samples"), ("", "train/tokens", "tokens")):
        values = records.series(name)[1]
        if values:
            rows.append((title, f"{sum(values):,.0f} {unit}"))
    step_times = records.series("perf/step_time")[1]
    if step_times:
        rows.append(("time in steps", format_seconds(sum(step_times))))
    speed = mean(records.series("perf/tokens_per_second")[1])
    if speed is not None:
        rows.append(("speed", f"{speed:,.0f} tokens/s"))
    if records.unreadable_lines:
        rows.append(("unreadable lines in metrics.jsonl", str(records.unreadable_lines)))
    return rows


def _result(records: Records) -> str:
    rows = []
    for name in records.eval_sets():
        steps, values = records.series(f"eval/{name}/accuracy")
        best = max(range(len(values)), key=values.__getitem__)
        after = f"{values[-1]:.3f} (step {steps[-1]})" if len(steps) > 1 else "-"
        first = f"{values[0]:.3f} (step {steps[0]})"
        rows.append((f"held-out accuracy, {name}", first, after, f"{values[best]:.3f} (step {steps[best]})"))
    measures = [("reward of training samples", "rollout/reward_mean")]
    if records.series("train/accuracy")[0]:
        # Only a supervised run's loss is shown: the policy-gradient loss is no measure of progress.
        measures += [("loss", "train/loss"), ("token accuracy", "train/accuracy")]
    for title, name in measures:
        values = records.series(name)[1]
        if values:
            n = min(EDGE_STEPS, len(values))
            rows.append((f"{title} (mean of {n} steps)", _text(mean(values[:n])), _text(mean(values[-n:])), ""))
    return _table(["", "before", "after", "best"], rows) if rows else ""


def _health(records: Records) -> str:
    rows = []
    for title, name, combine in _HEALTH_ROWS:
        values = [combine(records.series(f"vespo/{name}{sign}")[1]) for sign in ("", "_pos", "_neg")]
        if any(value is not None for value in values):
            rows.append((title, *map(_text, values)))
    staleness = records.series("rollout/staleness_max")[1]
    if staleness:
        rows.append(("largest staleness (updates)", f"{max(staleness):.0f}", "", ""))
    return _table(["over the whole run", "all samples", "A > 0", "A < 0"], rows) if rows else ""


def _warnings(records: Records) -> list[str]:
    """What keeps a run from learning, judged by its last steps."""

    def recent(name: str) -> float | None:
        return mean(records.series(name)[1][-EDGE_STEPS:])

    warnings = []
    phi = recent("vespo/phi_mean")
    if phi is not None and phi < 0.1:
        warnings.append(
            f"Mean phi is {phi:.3f}: the samples are hardly heard. The policy has moved far from what sampled them, or "
            "the engine's log-probabilities differ from the trainer's (sampling temperature, top-p, weight sync)."
        )
    equal = recent("rollout/equal_reward_share")
    if equal is not None and equal > 0.9:
        warnings.append(f"{equal:.0%} of the groups have equal rewards, which give no gradient: too easy or too hard.")
    failed = recent("rollout/reward_failed_share")
    if failed:
        warnings.append(
            f"{failed:.1%} of the samples could not be scored and were not learned from; rollouts/ says why "
            "(reward_error)."
        )
    infinite = recent("vespo/log_w_infinite_share")
    if infinite:
        warnings.append(f"{infinite:.1%} of the samples have an infinite log W and are dropped.")
    truncated = recent("rollout/truncated_share")
    if truncated is not None and truncated > 0.5:
        warnings.append(f"{truncated:.0%} of the responses are cut at the length limit.")
    return warnings


def _told(folder: Path) -> list[str]:
    """The last warnings of the health panel."""
    file = folder / "health" / "warnings.jsonl"
    lines = file.read_text(encoding="utf-8", errors="replace").splitlines() if file.is_file() else []
    told = []
    for line in lines[-LAST_WARNINGS:]:
        try:
            record = json.loads(line)
        except json.JSONDecodeError:  # cut by a crash
            continue
        told.append(f"Step {record['step']}: {record['text']}.")
    return told


def _time_split(records: Records) -> str:
    step_time = mean(records.series("perf/step_time")[1])
    if not step_time:
        return ""
    # Phases that only some steps have (evaluation) are spread over all steps.
    steps = len(records.series("perf/step_time")[1])
    parts = {name: sum(records.series(f"perf/{name}_time")[1]) / steps for name in PHASES}
    rows = [(name, f"{seconds:.3g}", f"{seconds / step_time:.0%}") for name, seconds in parts.items() if seconds]
    rows.append(("whole step", f"{step_time:.3g}", "100%"))
    return _table(["phase", "seconds", "share"], rows)


def _text(value: float | None) -> str:
    return "-" if value is None else f"{value:.3g}" if abs(value) >= 100 else f"{value:.3f}"


def _section(title: str, body: str) -> str:
    return f"## {title}\n\n{body}" if body else ""


def _table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)
