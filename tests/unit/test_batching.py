import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_vespo.batching import MicrobatchPlan, plan_microbatches, split_minibatches
from megatron_vespo.errors import UserError


def test_minibatches_are_contiguous_and_equal() -> None:
    assert split_minibatches(range(6), 3) == [[0, 1], [2, 3], [4, 5]]
    assert split_minibatches("ab", 1) == [["a", "b"]]


@pytest.mark.parametrize("count, n", [(6, 4), (6, 0), (0, 1), (2, 4)])
def test_minibatches_that_cannot_be_equal_are_refused(count: int, n: int) -> None:
    with pytest.raises(UserError, match=f"{count} samples into {n}"):
        split_minibatches(range(count), n)


def check_invariants(plan: MicrobatchPlan, lengths: list[int], dp_size: int, max_tokens: int) -> None:
    microbatches = [m for rank in plan.ranks for m in rank]
    assert sorted(i for m in microbatches for i in m) == list(range(len(lengths)))
    assert len(plan.ranks) == dp_size
    assert {len(rank) for rank in plan.ranks} == {plan.num_microbatches}
    assert all(sum(lengths[i] for i in m) <= max_tokens for m in microbatches)
    assert all(m == sorted(m) for m in microbatches)
    if len(lengths) >= len(microbatches):
        assert all(microbatches)
    for rank in plan.ranks:
        # Every rank has work, and its empty microbatches come last.
        assert rank[0]
        assert sorted(rank, key=lambda m: not m) == rank


def efficiency(plan: MicrobatchPlan, costs: list[float], dp_size: int) -> float:
    slowest = (max(sum(costs[i] for i in m) for m in slot) for slot in zip(*plan.ranks, strict=True))
    return sum(costs) / (dp_size * sum(slowest))


@st.composite
def problems(draw: st.DrawFn) -> tuple[list[int], int, int]:
    dp_size = draw(st.integers(1, 8))
    max_tokens = draw(st.integers(1, 200))
    lengths = draw(st.lists(st.integers(1, max_tokens), min_size=dp_size, max_size=60))
    return lengths, dp_size, max_tokens


@settings(max_examples=500, deadline=None)
@given(problems())
def test_invariants(problem: tuple[list[int], int, int]) -> None:
    lengths, dp_size, max_tokens = problem
    plan = plan_microbatches(lengths, dp_size, max_tokens)
    check_invariants(plan, lengths, dp_size, max_tokens)
    assert plan == plan_microbatches(lengths, dp_size, max_tokens)
    assert plan.efficiency == pytest.approx(efficiency(plan, [float(n) for n in lengths], dp_size))
    assert 0 < plan.efficiency <= 1 + 1e-12
    # Any-fit packing fills all bins but one beyond half, so this bounds K from above.
    lower = -(-sum(lengths) // (dp_size * max_tokens))
    assert lower <= plan.num_microbatches <= max(1, -(-(2 * sum(lengths) // max_tokens + 1) // dp_size))


@settings(max_examples=200, deadline=None)
@given(problems(), st.sampled_from([lambda n: float(n * n), lambda n: 0.0, lambda n: 1.0, lambda n: 1000.0 / n]))
def test_invariants_hold_for_any_cost(problem: tuple[list[int], int, int], cost) -> None:  # type: ignore[no-untyped-def]
    lengths, dp_size, max_tokens = problem
    plan = plan_microbatches(lengths, dp_size, max_tokens, cost)
    check_invariants(plan, lengths, dp_size, max_tokens)
    if any(cost(n) for n in lengths):
        assert plan.efficiency == pytest.approx(efficiency(plan, [cost(n) for n in lengths], dp_size))
    else:
        assert plan.efficiency == 1.0


def test_realistic_batches_are_packed_well() -> None:
    rng = random.Random(0)
    for dp_size in (2, 8, 16):
        lengths = [min(4096, int(rng.lognormvariate(6.5, 0.8)) + 50) for _ in range(512)]
        plan = plan_microbatches(lengths, dp_size, 16_384)
        assert plan.efficiency > 0.97
        assert plan.num_microbatches <= -(-sum(lengths) // (dp_size * 16_384)) + 1
        quadratic = plan_microbatches(lengths, dp_size, 16_384, lambda n: n + n * n / 8192)
        assert quadratic.efficiency > 0.97


def test_tight_packing_is_tried_before_another_microbatch() -> None:
    # Balanced packing puts 6 and 5 apart, then 4, 3 and 2 fit no more; 6+4 and 5+3+2 do.
    plan = plan_microbatches([6, 5, 4, 3, 2], 1, 10)
    assert plan.num_microbatches == 2


def test_a_few_large_samples_leave_empty_microbatches_at_the_end() -> None:
    plan = plan_microbatches([10, 10, 10], 2, 10)
    assert plan.num_microbatches == 2
    assert sorted(len(rank[1]) for rank in plan.ranks) == [0, 1]


def test_errors() -> None:
    with pytest.raises(UserError, match="3 samples cannot keep 4"):
        plan_microbatches([1, 1, 1], 4, 10)
    with pytest.raises(UserError, match="sample 1 has 11 tokens, more than the 10"):
        plan_microbatches([1, 11], 1, 10)
    with pytest.raises(UserError, match="sample 7/3 has 11"):
        plan_microbatches([1, 11], 1, 10, names=["7/2", "7/3"])
    with pytest.raises(UserError, match="positive"):
        plan_microbatches([1], 1, 0)
    with pytest.raises(ValueError, match="0 tokens"):
        plan_microbatches([1, 0], 1, 10)
