"""Which charts the page has, declared; and long curves made short."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from megatron_vespo.metrics.records import Records
from megatron_vespo.metrics.registry import PHASES, metric

# Points of a curve on the page. Longer ones keep the lowest and the highest value of each stretch of steps.
MAX_POINTS = 1000


@dataclass(frozen=True, slots=True)
class Chart:
    """One chart: the section it is in, its title, and the metrics drawn in it by the name of their
    line; a text where the first metric's description does not do.
    """

    section: str
    title: str
    lines: dict[str, str]
    text: str = ""


_LEARNING, _HEALTH, _STALENESS, _TIME = "Learning", "Off-policy health", "Staleness", "Time and throughput"
SECTIONS = (_LEARNING, _HEALTH, _STALENESS, _TIME)


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
        {q: f"health/log_w_{p}" for q, p in (("5 %", "p05"), ("median", "p50"), ("95 %", "p95"))},
        "How much likelier a response has become since it was sampled: quantiles over the samples; 0 is on-policy.",
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
    """The charts that any of the runs has data for: lines name the run by its place and hold steps and values."""
    names = sorted({name for run in runs for name in run.eval_sets()})
    held_out = tuple(Chart(_LEARNING, f"Held-out accuracy: {name}", {"": f"eval/{name}/accuracy"}) for name in names)
    found = []
    for chart in held_out + _PLAIN:
        lines = []
        for place, records in enumerate(runs):
            for label, name in chart.lines.items():
                steps, values = records.series(name)
                if steps:
                    lines.append({"run": place, "label": label, "points": thin_out(steps, values)})
        if lines:
            row = metric(next(iter(chart.lines.values())))
            text = chart.text or row.description
            described = {"section": chart.section, "title": chart.title, "unit": row.unit, "text": text}
            found.append({**described, "lines": lines})
    return found


def thin_out(steps: list[int], values: list[float], limit: int = MAX_POINTS) -> tuple[list[int], list[float]]:
    """At most ``limit`` points: of each equal stretch the lowest and the highest value, so that no spike is lost."""
    if len(steps) <= limit:
        return steps, values
    stretches, kept = limit // 2, set[int]()
    for i in range(stretches):
        stretch = range(i * len(steps) // stretches, (i + 1) * len(steps) // stretches)
        kept |= {min(stretch, key=values.__getitem__), max(stretch, key=values.__getitem__)}
    order = sorted(kept)
    return [steps[i] for i in order], [values[i] for i in order]
