"""From the reward's name in the config to the function that scores a sample."""

from __future__ import annotations

import importlib
import importlib.util
import re
import sys
from collections.abc import Awaitable, Callable
from pathlib import Path
from types import ModuleType

from megatron_vespo.errors import UserError
from megatron_vespo.types import Sample

# Scores one sample; may be ``async def``. It must not change the sample.
RewardFunction = Callable[[Sample], float | Awaitable[float]]

# Sample.text keeps special tokens, so the stop token that ended the response stands at its end.
_END_TOKENS = re.compile(r"(?:\s|<\|[^<>|]*\|>|</s>|<eos>|<pad>)+\Z")


def exact_match(sample: Sample) -> float:
    """1.0 where the response is the label and nothing else, spaces and end-of-text tokens around it aside; else 0.0."""
    return float(_END_TOKENS.sub("", sample.text).strip() == sample.prompt.label.strip())


BUILTIN_REWARDS: dict[str, RewardFunction] = {"exact_match": exact_match}


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

    source, _, name = spec.rpartition(":")
    module = _load_file(Path(source)) if source.endswith(".py") else _load_module(source)
    function = getattr(module, name, None)
    if function is None:
        raise UserError(f"reward {spec!r}: {source} has no function {name!r}")
    if not callable(function):
        raise UserError(f"reward {spec!r}: {name} is a {type(function).__name__}, not a function")
    return function


def _load_file(path: Path) -> ModuleType:
    path = path.expanduser().resolve()
    if not path.is_file():
        raise UserError(f"reward file {path} does not exist")
    # The name is made from the whole path: two files of one name must not share a module.
    name = "megatron_vespo_reward_" + re.sub(r"\W", "_", str(path))
    module_spec = importlib.util.spec_from_file_location(name, path)
    assert module_spec is not None and module_spec.loader is not None  # holds for every path that ends in .py
    module = importlib.util.module_from_spec(module_spec)
    # Dataclasses and pickle look a module up by its name.
    sys.modules[name] = module
    module_spec.loader.exec_module(module)
    return module


def _load_module(name: str) -> ModuleType:
    if not re.fullmatch(r"\w+(\.\w+)*", name):
        raise UserError(
            f"{name!r} is neither a module nor a .py file; write package.module:function or file.py:function"
        )
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        # A module that the user's module fails to import is their error, and needs their traceback.
        if error.name is None or not f"{name}.".startswith(f"{error.name}."):
            raise
        raise UserError(f"reward module {name!r} cannot be imported: there is no module {error.name!r}") from error
