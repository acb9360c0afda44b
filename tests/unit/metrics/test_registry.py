import math
from dataclasses import fields

import pytest
import torch

from megatron_vespo.algorithms.importance import WeightSummary, summarize_weights
from megatron_vespo.metrics.registry import METRICS, PHASES, Combine, StepMetrics, metric, phase_metrics, weight_metrics
from megatron_vespo.metrics.timers import Timers


def test_every_row_is_described() -> None:
    for name, row in METRICS.items():
        assert name == row.name
        assert name.split("/")[0] in ("train", "rollout", "reward", "vespo", "health", "perf", "eval")
        assert row.description.endswith(".")
        assert isinstance(row.combine, Combine)


def test_lookup() -> None:
    assert metric("train/grad_norm").combine is Combine.MEAN
    assert metric("eval/gsm8k/accuracy").name == "eval/<set>/accuracy"
    assert metric("reward/source").name == metric("reward/math").name == "reward/<term>"
    for source in ("math", "openai/gsm8k", "two words", "two\nlines"):
        assert metric(f"reward/source/{source}").name == "reward/source/<source>"
    for name in ("vespo/log_w_mean", "vespo/phi_mean_pos", "vespo/ess_w_neg", "perf/step_time", "perf/sync_time"):
        assert metric(name).name == name
    for unknown in (
        "train/gradnorm",
        "eval/accuracy",
        "eval/a/b/accuracy",
        "eval/gsm8k/f1",
        "reward/a/b",
        "reward/source/",
        "",
    ):
        with pytest.raises(ValueError, match="unknown metric"):
            metric(unknown)


def test_values_combine_as_declared() -> None:
    step = StepMetrics()
    for loss, version in ((1.0, 7), (3.0, 8)):
        step.update(
            {"train/loss": loss, "vespo/log_w_abs_max": loss, "train/tokens": loss, "train/policy_version": version}
        )
    assert step.result() == {
        "train/loss": 2.0,
        "vespo/log_w_abs_max": 3.0,
        "train/tokens": 4.0,
        "train/policy_version": 8.0,
    }


def test_none_is_skipped_and_nan_spreads() -> None:
    step = StepMetrics()
    for name in ("train/grad_norm", "vespo/log_w_abs_max"):
        for value in (1.0, math.nan, 2.0):
            step.add(name, value)
    step.update({"vespo/phi_mean_neg": None, "vespo/phi_mean_pos": None})
    step.add("vespo/phi_mean_pos", 0.5)
    result = step.result()
    assert result["vespo/phi_mean_neg"] is None
    assert result["vespo/phi_mean_pos"] == 0.5
    assert math.isnan(result["train/grad_norm"] or 0.0)
    assert math.isnan(result["vespo/log_w_abs_max"] or 0.0)


def test_unknown_names_are_errors_even_without_a_value() -> None:
    with pytest.raises(ValueError, match="train/gradnorm"):
        StepMetrics().add("train/gradnorm", None)


def test_weight_summaries_and_the_table_agree() -> None:
    ones = torch.ones(2)
    metrics = weight_metrics(summarize_weights(torch.tensor([0.0, 1.0]), ones, torch.tensor([1.0, -1.0]), ones))
    assert len(metrics) == 3 * len(fields(WeightSummary))
    assert metrics["vespo/log_w_mean"] == 0.5
    assert metrics["vespo/log_w_mean_pos"] == 0.0
    assert metrics["vespo/log_w_mean_neg"] == 1.0
    StepMetrics().update(metrics)
    parts = ("vespo/log_w_drift", "vespo/log_w_mismatch")  # of log W, where pi_old is known
    assert set(metrics) == {name for name in METRICS if name.startswith("vespo/") and not name.startswith(parts)}


def test_phases_and_the_table_agree() -> None:
    StepMetrics().update(phase_metrics({name: 1.0 for name in PHASES}))


class Clock:
    now = 100.0

    def __call__(self) -> float:
        return self.now


def test_timers_add_up_and_nest() -> None:
    clock = Clock()
    timers = Timers(clock)
    clock.now += 5  # under no timer
    with timers("train"):
        clock.now += 1
        with timers("sync"):
            clock.now += 10
            with timers("train"):
                clock.now += 100
        clock.now += 2
    with timers("train"):
        clock.now += 1000
    assert timers.seconds() == {"train": 1103.0, "sync": 10.0}


def test_timers_survive_errors_and_resets() -> None:
    clock = Clock()
    timers = Timers(clock)
    with pytest.raises(RuntimeError), timers("reward"):
        clock.now += 3
        raise RuntimeError
    clock.now += 50
    assert timers.seconds() == {"reward": 3.0}
    with timers("train"):
        clock.now += 1
        timers.reset()
        clock.now += 2
        assert timers.seconds() == {"train": 2.0}
    assert timers.seconds() == {"train": 2.0}
