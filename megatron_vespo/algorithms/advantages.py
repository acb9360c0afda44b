"""Advantage estimators: from the rewards of a group of samples to each sample's advantage."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from megatron_vespo.errors import UserError
from megatron_vespo.types import Sample, SampleGroup


@dataclass(frozen=True, slots=True)
class AdvantageEstimator[P]:
    """A named estimator with the dataclass of its parameters. Call it to set ``sample.advantage`` in place."""

    name: str
    params_type: type[P]
    function: Callable[[Sequence[SampleGroup], P], None]

    def __call__(self, groups: Sequence[SampleGroup], params: P) -> None:
        """Set the advantage of every sample of every group."""
        self.function(groups, params)


ADVANTAGE_ESTIMATORS: dict[str, AdvantageEstimator[Any]] = {}


def advantage_estimator[P](
    name: str, params_type: type[P]
) -> Callable[[Callable[[Sequence[SampleGroup], P], None]], AdvantageEstimator[P]]:
    """Decorator that registers an estimator under ``name``."""

    def register(function: Callable[[Sequence[SampleGroup], P], None]) -> AdvantageEstimator[P]:
        if name in ADVANTAGE_ESTIMATORS:
            raise ValueError(f"advantage estimator {name!r} is defined twice")
        estimator = AdvantageEstimator(name, params_type, function)
        ADVANTAGE_ESTIMATORS[name] = estimator
        return estimator

    return register


def get_advantage_estimator(name: str) -> AdvantageEstimator[Any]:
    """The estimator of that name.

    Raises:
        UserError: There is none.
    """
    if name not in ADVANTAGE_ESTIMATORS:
        raise UserError(f"unknown advantage estimator {name!r}; there are: {', '.join(sorted(ADVANTAGE_ESTIMATORS))}")
    return ADVANTAGE_ESTIMATORS[name]


def scored_samples(group: SampleGroup) -> list[Sample]:
    """The samples that advantages are relative to, after all of the group got advantage 0.

    Raises:
        UserError: A reward is not finite; names the sample.
    """
    scored = [sample for sample in group.samples if not sample.reward_error]
    for sample in scored:
        if not math.isfinite(sample.reward):
            raise UserError(f"the reward of sample {sample.name} is {sample.reward}; rewards must be finite")
    for sample in group.samples:
        sample.advantage = 0.0
    return scored


@dataclass(frozen=True, slots=True)
class GroupNormalizedParams:
    """Parameters of ``group_normalized``.

    Attributes:
        normalize_std: Divide by the group's standard deviation (GRPO); False only subtracts the mean (Dr. GRPO).
        eps: Added to the standard deviation.

    Raises:
        UserError: ``eps`` is negative or not finite.
    """

    normalize_std: bool = True
    eps: float = 1e-6

    def __post_init__(self) -> None:
        if not (math.isfinite(self.eps) and self.eps >= 0):
            raise UserError(f"group_normalized: eps must be a number >= 0, got {self.eps}")


@advantage_estimator("group_normalized", GroupNormalizedParams)
def group_normalized(groups: Sequence[SampleGroup], params: GroupNormalizedParams) -> None:
    """A = (reward - mean) / (std + eps) within each group (GRPO, arXiv 2402.03300).

    std is the sample standard deviation (divisor n - 1), torch.std's default and so what TRL and verl compute; eps is
    verl's. A group whose rewards are all equal gets 0.0 exactly, and so does a group of one sample, which has nothing
    to be compared with (verl keeps the bare reward there). A sample that could not be scored (``reward_error``) gets
    0.0 exactly and counts for nothing in its group.

    Raises:
        UserError: A reward is not finite; names the sample.
    """
    for group in groups:
        scored = scored_samples(group)
        for sample, advantage in zip(scored, _normalize([sample.reward for sample in scored], params), strict=True):
            sample.advantage = advantage


def _normalize(rewards: list[float], params: GroupNormalizedParams) -> list[float]:
    # The rewards are compared, not the result: reward - mean may leave a float residue, which eps blows up to
    # small signed advantages.
    if all(reward == rewards[0] for reward in rewards):
        return [0.0] * len(rewards)
    mean = math.fsum(rewards) / len(rewards)
    centered = [reward - mean for reward in rewards]
    if not params.normalize_std:
        return centered
    std = math.sqrt(math.fsum(value * value for value in centered) / (len(rewards) - 1))
    return [value / (std + params.eps) for value in centered]


@dataclass(frozen=True, slots=True)
class LeaveOneOutParams:
    """``leave_one_out`` has no parameters."""


@advantage_estimator("leave_one_out", LeaveOneOutParams)
def leave_one_out(groups: Sequence[SampleGroup], params: LeaveOneOutParams) -> None:
    """A = reward - mean of the other samples' rewards (RLOO, arXiv 2402.14740): an unbiased baseline.

    Equal rewards, groups of one sample and samples that could not be scored are treated as in ``group_normalized``.

    Raises:
        UserError: A reward is not finite; names the sample.
    """
    for group in groups:
        scored = scored_samples(group)
        centered = _normalize([sample.reward for sample in scored], GroupNormalizedParams(normalize_std=False))
        for sample, value in zip(scored, centered, strict=True):
            sample.advantage = value * len(scored) / max(len(scored) - 1, 1)
