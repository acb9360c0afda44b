"""From the reward's name in the config to the function that scores a sample."""

from __future__ import annotations

import re
from collections.abc import Awaitable, Callable

from megatron_vespo.dotted import load_object
from megatron_vespo.errors import UserError
from megatron_vespo.rewards.reasoning import reasoning_gym
from megatron_vespo.types import Sample

# Scores one sample; may be ``async def``. It must not change the sample.
RewardFunction = Callable[[Sample], float | Awaitable[float]]

# Sample.text keeps special tokens, so the stop token that ended the response stands at its end.
_END_TOKENS = re.compile(r"(?:\s|<\|[^<>|]*\|>|</s>|<eos>|<pad>)+\Z")


def exact_match(sample: Sample) -> float:
    """1.0 where the response is the label and nothing else, spaces and end-of-text tokens around it aside; else 0.0."""
    return float(_END_TOKENS.sub("", sample.text).strip() == sample.prompt.label.strip())


BUILTIN_REWARDS: dict[str, RewardFunction] = {"exact_match": exact_match, "reasoning_gym": reasoning_gym}


def load_reward(spec: str) -> RewardFunction:
    """Find a reward function.

    Args:
        spec: A built-in name (``exact_match``), ``path/to/file.py:function`` or ``package.module:function``.

    Raises:
        UserError: The name, file, module or function does not exist, or is not callable. Errors raised by the user's
            own module while it is imported pass through with their traceback.
    """
    if ":" not in spec:
        if spec not in BUILTIN_REWARDS:
            raise UserError(
                f"unknown reward {spec!r}; built in: {', '.join(sorted(BUILTIN_REWARDS))}; "
                "or write path/to/file.py:function or package.module:function"
            )
        return BUILTIN_REWARDS[spec]

    function = load_object(spec, "reward")
    if not callable(function):
        raise UserError(f"reward {spec!r} is a {type(function).__name__}, not a function")
    return function
