"""The figures of the health panel, on batches small enough to count by hand."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest

from megatron_vespo.algorithms.health import LENGTH_BUCKETS, outliers, summarize_health
from megatron_vespo.algorithms.tokens import Tokens, gather_tokens, join_tokens
from megatron_vespo.metrics.registry import METRICS
from megatron_vespo.types import Prompt, Sample


def make_sample(index: int, log_mu: list[float], versions: list[int]) -> Sample:
    ids = np.arange(len(log_mu), dtype=np.int32)
    return Sample(
        Prompt(index, np.array([1], np.int32)),
        0,
        ids,
        np.array(log_mu, np.float32),
        np.array(versions, np.int32),
        "stop",
    )


SAMPLES = [
    make_sample(0, [-1.0, -2.0, -3.0], [5, 5, 7]),
    make_sample(1, [], []),
    make_sample(2, [-0.5] * 70, [8] * 70),
]
LOG_PI = [np.array([-1.5, -2.0, -9.0], np.float32), np.zeros(0, np.float32), np.full(70, -0.5, np.float32)]
ENTROPY = [np.ones(3, np.float32), np.zeros(0, np.float32), np.ones(70, np.float32)]


def make_tokens() -> Tokens:
    return gather_tokens(SAMPLES, [sample.log_mu for sample in SAMPLES], LOG_PI, ENTROPY, 8)


def summarize(tokens: Tokens, **changes: object) -> dict[str, float | None]:
    arguments = {"log_w_limit": 80.0, "token_limit": 3.0} | changes
    log_w = np.array([-6.5, 0.0, 90.0])
    return summarize_health(tokens, log_w, np.array([0.01, 1.0, 0.5]), np.array([1.0, 2.0, -1.0]), **arguments)


def test_tokens_of_three_samples() -> None:
    tokens = make_tokens()
    assert tokens.staleness[:3].tolist() == [3, 3, 1] and not tokens.staleness[3:].any()
    assert tokens.after_push.tolist() == [False, False, True] + [False] * 70
    assert tokens.position[:5].tolist() == [0, 1, 2, 0, 1]
    assert tokens.per_sample(tokens.log_ratio).tolist() == [-6.5, 0.0, 0.0]
    assert tokens.of_sample(np.array([1, 2, 3]))[:4].tolist() == [1, 1, 1, 3]
    joined = join_tokens([tokens, tokens])
    assert len(joined) == 146 and joined.lengths.tolist() == [3, 0, 70] * 2 and joined.router_flips is None


def test_no_tokens_at_all() -> None:
    empty = make_tokens().__class__(*(getattr(make_tokens(), n)[:0] for n in Tokens.__slots__[:5]), np.zeros(2, int))
    figures = summarize_health(empty, np.zeros(2), np.ones(2), np.ones(2), log_w_limit=None, token_limit=3.0)
    assert set(figures.values()) == {None}
    assert outliers(empty, 3.0, 5) == (0, [])


def test_figures_by_sign_and_length() -> None:
    figures = summarize(make_tokens())
    assert (figures["log_w_p50_pos"], figures["log_w_p50_neg"], figures["log_w_p05"]) == (-6.5, 90.0, -6.5)
    assert (figures["clamp_share"], figures["clamp_share_pos"], figures["clamp_share_neg"]) == (0.5, 0.0, 1.0)
    assert figures["kl_k1_pos"] == pytest.approx(6.5 / 3) and figures["kl_k1_neg"] == 0
    third = math.exp(-0.5) - 1 + 0.5 + math.exp(-6) - 1 + 6
    assert figures["kl_k3_len64"] == pytest.approx(third / 3) and figures["kl_k3"] == pytest.approx(third / 73)
    assert (figures["samples_len64"], figures["samples_len256"]) == (1.0, 1.0)
    assert (figures["phi_mean_len64"], figures["phi_small_share_len64"]) == (0.01, 1.0)
    assert not any(name.endswith("_len1024") for name in figures), "nothing is said of buckets without samples"
    assert (figures["staleness_0_share"], figures["staleness_1_3_share"]) == pytest.approx((70 / 73, 3 / 73))
    assert figures["kl_fresh"] == 0
    assert (figures["outlier_tokens"], figures["outlier_share"]) == (1.0, pytest.approx(1 / 73))
    assert "router_flip_rate" not in figures
    known = replace(make_tokens(), router_flips=np.full(73, 0.25, np.float32))
    assert summarize(known)["router_flip_rate"] == 0.25
    partly = replace(make_tokens(), router_flips=np.array([0.5] + [np.nan] * 72, np.float32))
    assert summarize(partly)["router_flip_rate"] == 0.5
    nowhere = replace(make_tokens(), router_flips=np.full(73, np.nan, np.float32))
    assert "router_flip_rate" not in summarize(nowhere)
    assert summarize(make_tokens(), log_w_limit=None)["clamp_share"] is None


def test_every_figure_is_a_metric_and_every_metric_a_figure() -> None:
    lengths = np.array([10, 100, 1000, 4000, 5000])
    size = int(lengths.sum())
    ones = np.ones(size, np.float32)
    tokens = Tokens(ones, ones, ones, np.zeros(size, int), np.zeros(size, bool), lengths, ones)
    signs = np.array([1.0, 1, -1, -1, 0])
    figures = summarize_health(tokens, np.zeros(5), np.ones(5), signs, log_w_limit=80.0, token_limit=3.0)
    assert {f"health/{name}" for name in figures} == {name for name in METRICS if name.startswith("health/")}
    assert [figures[f"samples_{name}"] for name, _ in LENGTH_BUCKETS] == [1.0] * 5


def test_the_worst_tokens_come_first_and_the_impossible_before_them() -> None:
    tokens = make_tokens()
    assert outliers(tokens, 0.4, 10) == (2, [2, 0])
    assert outliers(tokens, 0.4, 1) == (2, [2])
    log_pi = tokens.log_pi.copy()
    log_pi[20] = -np.inf
    impossible = replace(tokens, log_pi=log_pi)
    assert outliers(impossible, 3.0, 10) == (2, [20, 2])
    kl = summarize(impossible)["kl_k3"]
    assert kl is not None and math.isfinite(kl)
