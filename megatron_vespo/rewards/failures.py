"""Samples that could not be scored: why, how many, and how many are too many."""

from __future__ import annotations

import math
import sys
import traceback
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from numbers import Real
from pathlib import Path

import numpy as np

from megatron_vespo.errors import UserError
from megatron_vespo.types import Sample

MESSAGE_LENGTH = 500
# Where a traceback's frames are not the user's code: the interpreter, installed packages, and this one.
_NOT_THE_USERS = ("<frozen", sys.prefix, sys.base_prefix, str(Path(__file__).parent))


class RewardFailure(Exception):
    """One sample could not be scored. The message says why, and is the sample's ``reward_error``."""


@dataclass(slots=True)
class RewardCounts:
    """What became of samples.

    Attributes:
        scored: Samples with a reward.
        failed: Samples whose reward function raised, or returned something else than one finite number.
        timed_out: Samples that took too long.
        crashed: Samples that ended their worker process.
        restarts: Worker processes started in the place of others.
    """

    scored: int = 0
    failed: int = 0
    timed_out: int = 0
    crashed: int = 0
    restarts: int = 0

    def since(self, earlier: RewardCounts) -> RewardCounts:
        """What was counted after ``earlier``."""
        return RewardCounts(
            self.scored - earlier.scored,
            self.failed - earlier.failed,
            self.timed_out - earlier.timed_out,
            self.crashed - earlier.crashed,
            self.restarts - earlier.restarts,
        )


def as_reward(value: object) -> float:
    """What a reward function returned, as a number.

    Raises:
        RewardFailure: It is not one finite number.
    """
    if isinstance(value, Real | np.bool_) and math.isfinite(value):
        return float(value)
    raise RewardFailure(f"returned {shorten(repr(value))}; it must return one finite number")


def describe_error(error: BaseException) -> str:
    """``ValueError: bad label (task.py:31)``: the exception and the innermost line of the user's code that it left."""
    if isinstance(error, RewardFailure | UserError):
        return str(error)
    text = shorten("".join(traceback.format_exception_only(error)).strip())
    frames = [(frame.f_code.co_filename, line) for frame, line in traceback.walk_tb(error.__traceback__)]
    own = [frame for frame in frames if not frame[0].startswith(_NOT_THE_USERS)] or frames
    if not own:
        return text
    file, line = own[-1]
    folder = f"{Path.cwd()}/"
    return f"{text} ({file.removeprefix(folder)}:{line})"


def shorten(text: str) -> str:
    """At most MESSAGE_LENGTH characters of it."""
    return text if len(text) <= MESSAGE_LENGTH else f"{text[:MESSAGE_LENGTH]}..."


def check_failures(samples: Sequence[Sample], max_failed_share: float, spec: str) -> None:
    """Refuse a batch of which too much could not be scored.

    Args:
        samples: All samples of the batch.
        max_failed_share: Largest share of them that may have a ``reward_error``.
        spec: The reward function's name in the configuration.

    Raises:
        UserError: More failed; names the function and the most frequent error.
    """
    errors = Counter(sample.reward_error for sample in samples if sample.reward_error)
    if errors.total() > max_failed_share * len(samples):
        error, count = errors.most_common(1)[0]
        raise UserError(
            f"reward function {spec}: {errors.total()} of {len(samples)} samples could not be scored, more than "
            f"reward.max_failed_share={max_failed_share:g} allows; most often, {count} times: {error}"
        )
