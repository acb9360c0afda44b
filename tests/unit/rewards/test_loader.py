import asyncio
import inspect
from pathlib import Path

import numpy as np
import pytest

from megatron_vespo.errors import UserError
from megatron_vespo.rewards.answers import exact_match
from megatron_vespo.rewards.loader import load_reward
from megatron_vespo.types import Prompt, Sample


def sample(text: str, label: str) -> Sample:
    prompt = Prompt(0, np.array([1], np.int32), label)
    return Sample(prompt, 0, np.array([], np.int32), np.array([], np.float32), np.array([], np.int32), "stop", text)


@pytest.mark.parametrize(
    "text, label, reward",
    [
        ("4", "4", 1.0),
        (" 4\n", "4 ", 1.0),
        ("4<|im_end|>", "4", 1.0),
        ("4 </s> \n", "4", 1.0),
        ("4<|eot_id|><|endoftext|>", "4", 1.0),
        ("44", "4", 0.0),
        ("the answer is 4", "4", 0.0),
        ("", "4", 0.0),
        ("<|im_end|>4", "4", 0.0),
        ("4</answer>", "4", 0.0),
    ],
)
def test_exact_match(text: str, label: str, reward: float) -> None:
    assert exact_match(sample(text, label)) == reward


def test_builtin() -> None:
    assert load_reward("exact_match") is exact_match


def test_file_with_sync_and_async_functions(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "my.reward.py").write_text(
        "from dataclasses import dataclass\n"
        "@dataclass\nclass Judge:\n    bonus: float = 0.5\n"
        "def length(sample):\n    return len(sample.text) + Judge().bonus\n"
        "async def later(sample):\n    return 2.0\n"
    )
    monkeypatch.chdir(tmp_path)
    assert load_reward("my.reward.py:length")(sample("abc", "")) == 3.5
    later = load_reward(f"{tmp_path}/my.reward.py:later")(sample("", ""))
    assert inspect.iscoroutine(later)
    assert asyncio.run(later) == 2.0


def test_files_of_one_name_do_not_mix(tmp_path: Path) -> None:
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "reward.py").write_text(f"def f(sample):\n    return '{name}'\n")
    first, second = (load_reward(f"{tmp_path}/{name}/reward.py:f") for name in ("a", "b"))
    assert (first(sample("", "")), second(sample("", ""))) == ("a", "b")


def test_module() -> None:
    assert load_reward("megatron_vespo.rewards.answers:exact_match") is exact_match


@pytest.mark.parametrize(
    "spec, message",
    [
        ("exact", "built in: code, exact_match"),
        ("missing/file.py:f", "missing/file.py does not exist"),
        ("no_such_package.module:f", "no module 'no_such_package'"),
        ("megatron_vespo.rewards.nothing:f", "no module 'megatron_vespo.rewards.nothing'"),
        ("megatron_vespo.rewards.loader:nothing", "has no 'nothing'"),
        ("megatron_vespo.rewards.loader:", "has no ''"),
        ("megatron_vespo.rewards.loader:BUILTIN_REWARDS", "is a dict, not a function"),
        (":f", "neither a module nor"),
        ("./x:f", "neither a module nor"),
        ("..x:f", "neither a module nor"),
    ],
)
def test_what_does_not_exist_is_named(spec: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        load_reward(spec)


def test_errors_of_the_users_own_module_pass_through(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "broken_reward.py").write_text("import no_such_dependency\n")
    monkeypatch.syspath_prepend(tmp_path)
    for spec in ("broken_reward:f", f"{tmp_path}/broken_reward.py:f"):
        with pytest.raises(ModuleNotFoundError, match="no_such_dependency"):
            load_reward(spec)


PARAMETRISED = """
def scaled(sample, by):
    return by * len(sample.text)
class Counter:
    def __init__(self, start=0):
        if start < 0:
            raise ValueError("start must not be negative")
        self.calls = start
    def __call__(self, sample):
        self.calls += 1
        return self.calls
class Mute:
    pass
"""


def test_params_are_arguments_of_a_function_or_of_a_class(tmp_path: Path) -> None:
    (tmp_path / "own.py").write_text(PARAMETRISED)
    assert load_reward(f"{tmp_path}/own.py:scaled", {"by": 3})(sample("abcd", "")) == 12
    counter = load_reward(f"{tmp_path}/own.py:Counter", {"start": 5})
    assert [counter(sample("", "")) for _ in range(2)] == [6, 7]
    assert load_reward("exact_match", {"answer": "boxed"})(sample("so \\boxed{4}", "4")) == 1.0


@pytest.mark.parametrize(
    "spec, params, message",
    [
        ("scaled", {"of": 1}, "params do not fit: missing a required argument: 'by'"),
        ("scaled", {"by": 1, "of": 1}, "params do not fit: got an unexpected keyword argument 'of'"),
        ("Counter", {"start": -1}, "start must not be negative"),
        ("Mute", {}, "objects cannot be called"),
    ],
)
def test_params_that_do_not_fit(tmp_path: Path, spec: str, params: dict[str, int], message: str) -> None:
    (tmp_path / "own.py").write_text(PARAMETRISED)
    with pytest.raises(UserError, match=message):
        load_reward(f"{tmp_path}/own.py:{spec}", params)


def test_a_built_in_says_what_it_needs() -> None:
    with pytest.raises(UserError, match="overlong: params do not fit: missing a required argument: 'max_tokens'"):
        load_reward("overlong")
