"""From the reward's name in the config to the function that scores a sample."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Awaitable, Callable, Mapping
from typing import Any

from megatron_vespo.dotted import check_object, load_object
from megatron_vespo.errors import UserError
from megatron_vespo.types import Sample

# Scores one sample; may be ``async def``. It must not change the sample.
RewardFunction = Callable[[Sample], float | Awaitable[float]]

_HERE = "megatron_vespo.rewards"
# Imported only where they are used: SymPy alone takes longer than all the rest.
BUILTIN_REWARDS: dict[str, str] = {
    "code": f"{_HERE}.code:CodeReward",
    "exact_match": f"{_HERE}.answers:exact_match",
    "format": f"{_HERE}.shaping:format_rule",
    "http": f"{_HERE}.remote:HttpReward",
    "math": f"{_HERE}.mathematics:math_answer",
    "multiple_choice": f"{_HERE}.answers:multiple_choice",
    "overlong": f"{_HERE}.shaping:overlong",
    "reasoning_gym": f"{_HERE}.reasoning:reasoning_gym",
    "truncated": f"{_HERE}.shaping:truncated",
}


def load_reward(spec: str, params: Mapping[str, Any] | None = None) -> RewardFunction:
    """Find a reward function.

    Args:
        spec: A built-in name (``exact_match``), ``path/to/file.py:function`` or ``package.module:function``. A class is
            called once, with the parameters; what it makes is the function.
        params: Further arguments, by name: a function gets them after the sample, a class alone.

    Raises:
        UserError: The name, file, module or function does not exist, is not callable, or does not take the parameters.
            Errors raised by the user's own module while it is imported pass through with their traceback.
    """
    _check_name(spec)
    try:
        function = load_object(BUILTIN_REWARDS.get(spec, spec), "reward")
    except ModuleNotFoundError as error:
        if spec not in BUILTIN_REWARDS:
            raise
        raise UserError(f"reward {spec} needs a package that is not installed: {error.name}") from error
    if not callable(function):
        raise UserError(f"reward {spec!r} is a {type(function).__name__}, not a function")
    return _with_params(spec, function, dict(params or {}))


def check_reward(spec: str) -> None:
    """Look whether there is such a reward function, without running anything of the user's. Raises as load_reward."""
    _check_name(spec)
    if spec not in BUILTIN_REWARDS:
        check_object(spec, "reward")


def _check_name(spec: str) -> None:
    if ":" not in spec and spec not in BUILTIN_REWARDS:
        raise UserError(
            f"unknown reward {spec!r}; built in: {', '.join(BUILTIN_REWARDS)}; "
            "or write path/to/file.py:function or package.module:function"
        )


def _with_params(spec: str, function: Any, params: dict[str, Any]) -> RewardFunction:
    is_class = isinstance(function, type)
    if params or is_class or spec in BUILTIN_REWARDS:
        try:
            inspect.signature(function).bind(*() if is_class else (None,), **params)
        except TypeError as error:
            raise UserError(f"reward {spec}: params do not fit: {error}") from None
    if not is_class:
        return functools.partial(function, **params) if params else function
    try:
        made = function(**params)
    except (ValueError, TypeError) as error:
        raise UserError(f"reward {spec}: {error}") from error
    if not callable(made):
        raise UserError(f"reward {spec!r} is a class whose objects cannot be called")
    return made
