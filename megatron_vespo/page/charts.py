"""Which charts the page has, declared; and long curves made short."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from megatron_vespo.metrics.records import Records, mean
from megatron_vespo.metrics.registry import PHASES, metric

# Points of a curve on the page. Longer ones keep the lowest and the highest value of each stretch of steps.
MAX_POINTS = 1000


@dataclass(frozen=True, slots=True)
class Chart:
    """One chart.

    Attributes:
        section: Where it is.
        title: Its head.
        lines: The metrics drawn in it by the name of their line.
        text: What it shows; empty: the first metric's description.
        bands: Lower and upper edge of what is shaded around a line, by its name.
    """

    section: str
    title: str
    lines: Mapping[str, str]
    text: str = ""
    bands: Mapping[str, tuple[str, str]] = field(default_factory=dict)


_EVALUATION, _LEARNING, _HEALTH = "Held-out evaluation", "Learning", "Off-policy health"
_STALENESS, _TIME = "Staleness", "Time and throughput"
SECTIONS = (_EVALUATION, _LEARNING, _HEALTH, _STALENESS, _TIME)


def _by_sign(name: str) -> dict[str, str]:
    return {"all": f"vespo/{name}", "A > 0": f"vespo/{name}_pos", "A < 0": f"vespo/{name}_neg"}


_PLAIN = (
    Chart(_LEARNING, "Reward", {"": "rollout/reward_mean"}),
    Chart(_LEARNING, "Loss", {"": "train/loss"}),
    Chart(_LEARNING, "Token accuracy", {"": "train/accuracy"}),
    Chart(_LEARNING, "Gradient norm", {"": "train/grad_norm"}),
    Chart(_LEARNING, "Entropy", {"": "train/entropy"}),
    Chart(_LEARNING, "Response length", {"": "rollout/response_length_mean"}),
    Chart(_LEARNING, "Groups without a signal", {"": "rollout/equal_reward_share"}),
    Chart(_HEALTH, "Weight phi", _by_sign("phi_mean")),
    Chart(_HEALTH, "ESS of phi", _by_sign("ess_phi")),
    Chart(_HEALTH, "ESS of W", _by_sign("ess_w")),
    Chart(
        _HEALTH,
        "log W",
        {"": "health/log_w_p50"},
        "How much likelier a response has become since it was sampled; shaded: 5 to 95 % of samples. 0: on-policy.",
        {"": ("health/log_w_p05", "health/log_w_p95")},
    ),
    Chart(_HEALTH, "Mean |log W|", {"": "vespo/log_w_abs_mean"}),
    Chart(_HEALTH, "KL of fresh tokens", {"": "health/kl_fresh"}),
    Chart(
        _HEALTH,
        "Outlier tokens",
        {"": "health/outlier_share"},
        "Share of response tokens whose |log pi - log mu| is above health.token_limit.",
    ),
    Chart(
        _STALENESS,
        "Staleness of samples",
        {"mean": "rollout/staleness_mean", "largest": "rollout/staleness_max"},
        "Updates between sampling and training.",
    ),
    Chart(
        _STALENESS,
        "Fresh tokens",
        {"": "health/staleness_0_share"},
        "Share of tokens that the current weights sampled.",
    ),
    Chart(_TIME, "Throughput", {"": "perf/tokens_per_second"}),
    Chart(
        _TIME,
        "Time of a step",
        {"whole": "perf/step_time", **{name: f"perf/{name}_time" for name in PHASES}},
        "Wall-clock time of the step and of its phases.",
    ),
)


def charts_of(runs: list[Records]) -> list[dict[str, Any]]:
    """The charts that any of the runs has data for: lines name the run by its place and hold their points."""
    found = []
    for chart in (*_held_out(runs), *_PLAIN):
        lines = []
        for place, records in enumerate(runs):
            for label, name in chart.lines.items():
                curve = _curve(records, name, chart.bands.get(label))
                if curve:
                    lines.append({"run": place, "label": label, **curve})
        if lines:
            row = metric(next(iter(chart.lines.values())))
            text = chart.text or row.description
            described = {"section": chart.section, "title": chart.title, "unit": row.unit, "text": text}
            found.append({**described, "lines": lines})
    return found


def _held_out(runs: list[Records]) -> list[Chart]:
    """avg@k and pass@k of each set."""
    charts = []
    for name in sorted({name for run in runs for name in run.eval_sets()}):
        pattern = re.compile(rf"eval/{re.escape(name)}/pass_at_(\d+)")
        names = {name for run in runs for row in run.values for name in row}
        ks = sorted((int(match[1]) for match in map(pattern.fullmatch, names) if match), reverse=True)
        average = {"": f"eval/{name}/accuracy"}
        passes = {f"pass@{k}": f"eval/{name}/pass_at_{k}" for k in ks if k > 1}
        text = "Mean reward over problems and responses, and its interval."
        charts.append(Chart(_EVALUATION, f"{name}: avg@k", average, text, _intervals(average)))
        text = "Probability that one of k responses at least is correct, and its interval."
        charts.append(Chart(_EVALUATION, f"{name}: pass@k", passes, text, _intervals(passes)))
    return [chart for chart in charts if chart.lines]


def _intervals(lines: Mapping[str, str]) -> dict[str, tuple[str, str]]:
    return {label: (f"{name}_low", f"{name}_high") for label, name in lines.items()}


def _curve(records: Records, name: str, band: tuple[str, str] | None) -> dict[str, Any]:
    """Points of a metric: lists of steps, values and, with a band, its edges; nothing where it was not measured.

    Of a curve that was thinned out there are ``means`` too, for who wants it smooth.
    """
    steps, values = records.series(name)
    if not steps:
        return {}
    columns: list[list[float]] = [values]
    if band:
        edges = [dict(zip(*records.series(edge), strict=True)) for edge in band]
        columns += [[edge.get(step, value) for step, value in zip(steps, values, strict=True)] for edge in edges]
    kept = thin_out(columns, MAX_POINTS)
    curve = {"points": [[steps[i] for i in kept], *([_short(column[i]) for i in kept] for column in columns)]}
    if len(kept) < len(steps):
        pieces = _stretches(len(steps), MAX_POINTS // 2)
        means = [_short(mean([values[i] for i in piece]) or 0.0) for piece in pieces]
        curve["means"] = [[steps[piece[-1]] for piece in pieces], means]
    return curve


def thin_out(columns: list[list[float]], limit: int) -> list[int]:
    """Places of ``limit`` points at most: the lowest and the highest value of each column in each of equal stretches,
    so that no spike is lost; and the first and the last.
    """
    length = len(columns[0])
    if length <= limit:
        return list(range(length))
    kept = {0, length - 1}
    for piece in _stretches(length, (limit - 2) // (2 * len(columns))):
        for column in columns:
            kept |= {min(piece, key=column.__getitem__), max(piece, key=column.__getitem__)}
    return sorted(kept)


def _stretches(length: int, number: int) -> list[range]:
    return [range(i * length // number, (i + 1) * length // number) for i in range(number)]


def _short(value: float) -> float:
    """Six digits: more than a screen shows."""
    return float(f"{value:.6g}")
