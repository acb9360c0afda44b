from itertools import combinations

import numpy as np
import pytest

from megatron_vespo.algorithms.accuracy import estimate_means, pass_at_k, powers_up_to, problem_values


@pytest.mark.parametrize("samples", range(1, 9))
def test_pass_at_k_is_the_share_of_all_choices_that_hold_a_correct_one(samples: int) -> None:
    for correct in range(samples + 1):
        answers = [index < correct for index in range(samples)]
        for k in range(1, samples + 1):
            choices = list(combinations(answers, k))
            wanted = sum(any(choice) for choice in choices) / len(choices)
            assert pass_at_k(samples, correct, k) == pytest.approx(wanted, abs=1e-12)


def test_pass_at_k_is_unbiased() -> None:
    """Of a problem that is solved with probability p: 1 - (1 - p)^k, which a plug-in estimate misses."""
    random, p, n, k = np.random.default_rng(1), 0.2, 8, 4
    correct = random.binomial(n, p, size=40_000)
    by_count = {c: pass_at_k(n, c, k) for c in range(n + 1)}
    mean = np.mean([by_count[c] for c in correct])
    plug_in = np.mean(1 - (1 - correct / n) ** k)
    assert mean == pytest.approx(1 - (1 - p) ** k, abs=0.006)
    assert abs(plug_in - (1 - (1 - p) ** k)) > 0.03


def test_large_numbers_neither_overflow_nor_cancel() -> None:
    assert pass_at_k(100_000, 1, 1000) == pytest.approx(0.01, rel=1e-9)
    assert pass_at_k(100_000, 0, 1000) == 0.0


@pytest.mark.parametrize("wrong", [(4, 0, 5), (4, 0, 0), (4, 5, 1), (4, -1, 1)])
def test_impossible_counts(wrong: tuple[int, int, int]) -> None:
    with pytest.raises(ValueError, match="pass@"):
        pass_at_k(*wrong)


def test_which_k() -> None:
    assert powers_up_to(1) == []
    assert powers_up_to(2) == [1, 2]
    assert powers_up_to(12) == [1, 2, 4, 8, 12]


def test_values_of_problems() -> None:
    values = problem_values([[1.0, 0.0], [0.5, 0.5]], correct_from=1.0, ks=[1, 2])
    assert values.tolist() == [[0.5, 0.5, 1.0], [0.5, 0.0, 0.0]]
    assert problem_values([[0.5, 0.5]], correct_from=0.5, ks=[1]).tolist() == [[0.5, 1.0]]


def draw(random: np.random.Generator, problems: int) -> np.ndarray:
    """Mean rewards and pass@4 of 8 responses to problems of all difficulties."""
    chances = random.beta(0.7, 0.9, size=problems)
    correct = random.binomial(8, chances)
    return np.stack([correct / 8, [pass_at_k(8, c, 4) for c in correct]], axis=1)


def test_intervals_hold_the_mean_as_often_as_they_say() -> None:
    random = np.random.default_rng(7)
    truth = draw(random, 200_000).mean(axis=0)
    for problems, least in ((30, 0.89), (150, 0.92)):
        held = np.zeros(2)
        trials = 300
        for trial in range(trials):
            estimates = estimate_means(draw(random, problems), resamples=400, seed=trial)
            held += [one.low <= mean <= one.high for one, mean in zip(estimates, truth, strict=True)]
        # Standard error of the share: 1.3 %. Above the nominal 95 % would mean intervals that are too wide.
        assert (held / trials >= least).all() and (held / trials <= 0.985).all(), held / trials


def test_intervals_know_that_responses_to_one_problem_belong_together() -> None:
    """Ten problems with a hundred responses each tell little more than ten problems."""
    values = np.repeat([[0.0], [1.0]], 5, axis=0)
    (estimate,) = estimate_means(values)
    assert estimate.value == 0.5 and estimate.low <= 0.2 and estimate.high >= 0.8


def test_same_answers_same_interval() -> None:
    values = np.random.default_rng(0).random((20, 1))
    assert estimate_means(values) == estimate_means(values)
    assert estimate_means(values, seed=1) != estimate_means(values)
    (narrow,), (wide,) = estimate_means(values, confidence=0.5), estimate_means(values, confidence=0.99)
    assert wide.low < narrow.low < narrow.value < narrow.high < wide.high
