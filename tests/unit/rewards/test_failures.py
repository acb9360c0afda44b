import math
from fractions import Fraction

import numpy as np
import pytest
import torch

from megatron_vespo.errors import UserError
from megatron_vespo.rewards.failures import (
    MESSAGE_LENGTH,
    RewardCounts,
    RewardFailure,
    as_reward,
    check_failures,
    describe_error,
)
from megatron_vespo.types import Prompt, Sample


def samples(*errors: str) -> list[Sample]:
    prompt, ids, floats = Prompt(0, np.array([1], np.int32)), np.array([], np.int32), np.array([], np.float32)
    return [Sample(prompt, i, ids, floats, ids, "stop", reward_error=error) for i, error in enumerate(errors)]


@pytest.mark.parametrize("value", [1, 0.5, True, Fraction(1, 2), np.float64(2), np.int32(3), np.bool_(True)])
def test_finite_numbers_are_rewards(value: object) -> None:
    reward = as_reward(value)
    assert type(reward) is float and reward == value


@pytest.mark.parametrize(
    "value", [math.nan, -math.inf, np.float32("inf"), "1", None, [1.0], 1j, torch.tensor(1.0), np.array([1.0])]
)
def test_nothing_else_is(value: object) -> None:
    with pytest.raises(RewardFailure, match=r"(?s)^returned .*; it must return one finite number$"):
        as_reward(value)


def test_an_error_is_told_with_the_users_line() -> None:
    def inner() -> None:
        np.linalg.inv(np.zeros((2, 2)))  # raises in a package's code

    with pytest.raises(np.linalg.LinAlgError) as caught:
        inner()
    line = inner.__code__.co_firstlineno + 1
    assert describe_error(caught.value).endswith(
        f"LinAlgError: Singular matrix (tests/unit/rewards/test_failures.py:{line})"
    )
    assert describe_error(ValueError("never raised")) == "ValueError: never raised"
    assert describe_error(UserError("as it is")) == describe_error(RewardFailure("as it is")) == "as it is"
    assert len(describe_error(ValueError("x" * 10_000))) < MESSAGE_LENGTH + 20


def test_errors_that_cannot_be_printed() -> None:
    class BadError(Exception):
        def __str__(self) -> str:
            raise RuntimeError

    assert "<exception str() failed>" in describe_error(BadError())


def test_too_many_failures_end_the_run() -> None:
    batch = samples("", "a", "", "took longer", "took longer", "", "", "")
    check_failures(batch, 3 / 8, "task.py:reward")
    check_failures(samples("", ""), 0.0, "task.py:reward")
    check_failures(samples("a", "b"), 1.0, "task.py:reward")
    check_failures([], 0.0, "task.py:reward")
    with pytest.raises(UserError) as caught:
        check_failures(batch, 0.3, "task.py:reward")
    assert str(caught.value) == (
        "reward function task.py:reward: 3 of 8 samples could not be scored, more than reward.max_failed_share=0.3 "
        "allows; most often, 2 times: took longer"
    )
    with pytest.raises(UserError, match="1 of 1"):
        check_failures(samples("a"), 0.0, "task.py:reward")


def test_counts_since_an_earlier_time() -> None:
    assert RewardCounts(9, 8, 7, 6, 5).since(RewardCounts(1, 2, 3, 4, 5)) == RewardCounts(8, 6, 4, 2, 0)
