import itertools
import math
from random import Random

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from megatron_vespo.algorithms.advantages import (
    ADVANTAGE_ESTIMATORS,
    GroupNormalizedParams,
    get_advantage_estimator,
    group_normalized,
)
from megatron_vespo.errors import UserError
from megatron_vespo.types import Prompt, Sample, SampleGroup


def group(rewards: list[float], index: int = 7) -> SampleGroup:
    prompt = Prompt(index, np.array([1], np.int32))
    empty_ids, empty_floats = np.array([], np.int32), np.array([], np.float32)
    samples = [
        Sample(prompt, i, empty_ids, empty_floats, empty_ids, "stop", reward=reward, advantage=99.0)
        for i, reward in enumerate(rewards)
    ]
    return SampleGroup(prompt, samples)


def advantages(rewards: list[float], params: GroupNormalizedParams | None = None) -> list[float]:
    result = group(rewards)
    group_normalized([result], params or GroupNormalizedParams())
    return [sample.advantage for sample in result.samples]


@given(st.lists(st.floats(-100, 100, width=16), min_size=2, max_size=16))
def test_equals_torch_std(rewards: list[float]) -> None:
    values = torch.tensor(rewards, dtype=torch.float64)
    if len(set(rewards)) == 1:
        assert advantages(rewards) == [0.0] * len(rewards)
    else:
        expected = (values - values.mean()) / (values.std() + 1e-6)
        assert advantages(rewards) == pytest.approx(expected.tolist(), rel=1e-9, abs=1e-9)


def test_without_std() -> None:
    assert advantages([0.0, 1.0, 1.0, 0.0], GroupNormalizedParams(normalize_std=False)) == [-0.5, 0.5, 0.5, -0.5]


@pytest.mark.parametrize("normalize_std", [True, False])
@pytest.mark.parametrize("reward", [0.1, 1 / 3, 0.7, 1e8 + 0.1])
@pytest.mark.parametrize("size", [1, 3, 7, 10])
def test_equal_rewards_give_exactly_zero(reward: float, size: int, normalize_std: bool) -> None:
    assert advantages([reward] * size, GroupNormalizedParams(normalize_std)) == [0.0] * size


REWARDS = st.floats(-100, 100, width=16)


@given(st.lists(st.tuples(REWARDS, st.booleans()), max_size=12), st.booleans())
def test_what_could_not_be_scored_is_as_if_it_were_not_there(
    outcomes: list[tuple[float, bool]], normalize_std: bool
) -> None:
    params = GroupNormalizedParams(normalize_std)
    result = group([reward for reward, _ in outcomes])
    for sample, (_, failed) in zip(result.samples, outcomes, strict=True):
        if failed:
            sample.reward_error = "took too long"
    group_normalized([result], params)
    assert [s.advantage for s in result.samples if s.reward_error] == [0.0] * sum(failed for _, failed in outcomes)
    scored = [reward for reward, failed in outcomes if not failed]
    assert [s.advantage for s in result.samples if not s.reward_error] == advantages(scored, params)
    if len(scored) < 2:
        assert all(sample.advantage == 0.0 for sample in result.samples)


@given(st.lists(REWARDS, min_size=2, max_size=12), st.randoms())
def test_advantages_sum_to_zero_and_follow_the_rewards(rewards: list[float], random: Random) -> None:
    order = list(range(len(rewards)))
    random.shuffle(order)
    found = advantages(rewards)
    assert math.fsum(found) == pytest.approx(0, abs=1e-9)
    assert advantages([rewards[i] for i in order]) == pytest.approx([found[i] for i in order], rel=1e-9, abs=1e-9)
    for (r, a), (s, b) in itertools.combinations(zip(rewards, found, strict=True), 2):
        assert (a < b) == (r < s)


def test_a_failed_samples_reward_is_not_looked_at() -> None:
    result = group([math.nan, 0.0, 1.0])
    result.samples[0].reward_error = "returned nan"
    group_normalized([result], GroupNormalizedParams(normalize_std=False))
    assert [sample.advantage for sample in result.samples] == [0.0, -0.5, 0.5]


def test_groups_are_independent() -> None:
    groups = [group([0.0, 1.0]), group([10.0, 20.0]), group([])]
    get_advantage_estimator("group_normalized")(groups, GroupNormalizedParams(eps=0.0))
    root = math.sqrt(0.5)
    assert [[s.advantage for s in g.samples] for g in groups[:2]] == [pytest.approx([-root, root])] * 2


@pytest.mark.parametrize("reward", [math.nan, math.inf, -math.inf])
def test_rewards_that_are_not_finite_are_refused(reward: float) -> None:
    with pytest.raises(UserError, match="7/1"):
        advantages([0.0, reward])


def test_registry_and_params() -> None:
    assert ADVANTAGE_ESTIMATORS["group_normalized"].params_type is GroupNormalizedParams
    with pytest.raises(UserError, match="group_normalized"):
        get_advantage_estimator("gae")
    with pytest.raises(UserError, match="eps"):
        GroupNormalizedParams(eps=-1.0)
