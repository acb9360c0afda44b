import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from megatron_vespo.algorithms import importance
from megatron_vespo.algorithms.importance import (
    StalenessSummary,
    WeightSummary,
    effective_sample_size,
    is_nonfinite,
    segment_sum,
    sequence_log_ratio,
    summarize_staleness,
    summarize_weights,
    token_chunks,
    token_log_ratio,
)

INF, NAN = math.inf, math.nan


@pytest.mark.parametrize("chunk", [1, 3, 8192])
def test_segment_sum_with_interleaved_and_empty_samples(monkeypatch: pytest.MonkeyPatch, chunk: int) -> None:
    monkeypatch.setattr(importance, "TOKENS_PER_CHUNK", chunk)
    values, index = torch.tensor([1.0, 2.0, 4.0, 8.0]), torch.tensor([2, 0, 2, 0])
    assert segment_sum(values, index, 4).tolist() == [10.0, 0.0, 5.0, 0.0]
    assert segment_sum(torch.zeros(0), torch.zeros(0, dtype=torch.int64), 2).tolist() == [0.0, 0.0]


def test_segment_sum_keeps_digits_of_long_float32_sums() -> None:
    values = torch.rand(200_000) - 0.5
    total = segment_sum(values, torch.zeros(200_000, dtype=torch.int64), 1)
    assert total.dtype == torch.float32
    assert total.item() == pytest.approx(math.fsum(values.tolist()), rel=2e-7, abs=1e-7)


def test_chunks_cover_every_token_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importance, "TOKENS_PER_CHUNK", 4)
    assert list(token_chunks(0)) == []
    assert list(token_chunks(4)) == [slice(0, 4)]
    assert list(token_chunks(9)) == [slice(0, 4), slice(4, 8), slice(8, 9)]


def test_log_ratios_with_zero_probabilities() -> None:
    log_pi = torch.tensor([-1.0, -INF, -1.0, -INF])
    log_mu = torch.tensor([-2.0, -1.0, -INF, -INF])
    assert token_log_ratio(log_pi, log_mu).tolist() == [1.0, -INF, INF, -INF]
    assert is_nonfinite(log_pi, log_mu).tolist() == [False] * 4


def test_nan_and_plus_infinity_are_no_log_probabilities() -> None:
    values = torch.tensor([NAN, INF, -INF, -1.0])
    for other in (-1.0, -INF):
        assert is_nonfinite(values, torch.full((4,), other)).tolist() == [True, True, False, False]
        assert is_nonfinite(torch.full((4,), other), values).tolist() == [True, True, False, False]


def test_log_w_is_nan_where_a_token_is_nonfinite_and_minus_infinity_where_infinities_cancel() -> None:
    total = torch.tensor([0.5, NAN, INF, -INF, 0.0, NAN, INF, -INF])
    n_nonfinite = torch.tensor([0.0, 0.0, 0.0, 0.0, 0.0, 1.0, 2.0, 1.0])
    log_w = sequence_log_ratio(total, n_nonfinite)
    assert log_w[:5].tolist() == [0.5, -INF, INF, -INF, 0.0]
    assert log_w[5:].isnan().all()


@given(st.lists(st.floats(-5, 5), min_size=1, max_size=30), st.floats(-1000, 1000))
def test_ess_equals_the_plain_formula_at_any_magnitude(log_w: list[float], shift: float) -> None:
    weights = [math.exp(x) for x in log_w]
    expected = sum(weights) ** 2 / (len(weights) * sum(w * w for w in weights))
    actual = effective_sample_size(torch.tensor(log_w, dtype=torch.float64) + shift)
    assert actual == pytest.approx(expected, rel=1e-9)
    assert 0 < actual <= 1


@pytest.mark.parametrize(
    "log_w, expected",
    [
        ([], None),
        ([-INF, -INF], 0.0),
        ([0.0], 1.0),
        ([1000.0] * 4, 1.0),
        ([-1000.0] * 3, 1.0),
        ([1000.0, -1000.0], 0.5),
        ([0.0, -INF, -INF, -INF], 0.25),
        ([INF, 0.0, 5.0, INF], 0.5),
    ],
)
def test_ess_limits(log_w: list[float], expected: float | None) -> None:
    assert effective_sample_size(torch.tensor(log_w)) == (expected if expected is None else pytest.approx(expected))


def test_weight_summaries_by_sign() -> None:
    log_w = torch.tensor([1.0, -3.0, 2.0, 0.0, 9.0])
    phi = torch.tensor([0.5, 0.05, 1.0, 1.0, 7.0])
    advantages = torch.tensor([1.0, 2.0, -1.0, 0.0, 1.0])
    n_tokens = torch.tensor([3.0, 2.0, 5.0, 4.0, 0.0])  # the last response is empty and counts nowhere
    summaries = summarize_weights(log_w, phi, advantages, n_tokens)
    positive = summaries.positive
    assert (positive.log_w_mean, positive.log_w_abs_mean, positive.log_w_abs_max) == (-1.0, 2.0, 3.0)
    assert positive.phi_mean == pytest.approx(0.275)
    assert positive.phi_small_share == 0.5
    assert positive.ess_w == pytest.approx(effective_sample_size(torch.tensor([1.0, -3.0])))
    assert positive.ess_phi == pytest.approx(0.55**2 / (2 * (0.25 + 0.0025)))
    assert summaries.negative.log_w_mean == 2.0
    assert summaries.all.log_w_abs_mean == pytest.approx(1.5)
    assert summaries.all.phi_small_share == 0.25


def test_weight_summaries_of_nothing_and_of_infinite_weights() -> None:
    infinite = torch.tensor([-INF, INF])
    summaries = summarize_weights(infinite, torch.zeros(2), torch.ones(2), torch.ones(2))
    assert summaries.negative == WeightSummary()
    assert summaries.positive.log_w_mean is None
    assert summaries.positive.log_w_abs_max == INF
    assert summaries.positive.log_w_infinite_share == 1.0
    assert summaries.positive.ess_phi == 0.0
    empty = torch.zeros(0)
    assert summarize_weights(empty, empty, empty, empty).all == WeightSummary()


def test_gaussian_log_w_gives_the_known_values() -> None:
    generator = torch.Generator().manual_seed(0)
    log_w = torch.randn(400_000, generator=generator, dtype=torch.float64) - 0.5
    assert effective_sample_size(log_w) == pytest.approx(math.exp(-1), rel=0.05)


def test_staleness() -> None:
    assert summarize_staleness([0, 3, 3]) == StalenessSummary(2.0, 3)
    assert summarize_staleness([]) == StalenessSummary(None, None)
