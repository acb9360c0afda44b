import json
from typing import Any

import pytest

from megatron_vespo.errors import UserError
from megatron_vespo.rewards.code import CodeReward, find_program
from megatron_vespo.rewards.code_cases import Checks, read_cases, same_output, same_value
from megatron_vespo.rewards.loader import load_reward
from megatron_vespo.rewards.sandbox import landlock, run
from tests.unit.rewards.scored import make

needs_sandbox = pytest.mark.skipif(landlock.version() < run.LANDLOCK_NEEDED, reason="no Landlock here")


@pytest.fixture(scope="module")
def reward() -> CodeReward:
    return CodeReward(seconds=3, cpu_seconds=2, total_seconds=8)


@pytest.fixture(scope="module")
def partial() -> CodeReward:
    return CodeReward(partial=True, seconds=3, cpu_seconds=2, total_seconds=8)


def block(code: str, language: str = "python") -> str:
    return f"Here it is:\n```{language}\n{code}\n```\nDone.<|im_end|>"


@pytest.mark.parametrize(
    "text, program",
    [
        (block("x = 1"), "x = 1\n"),
        (block("x = 1") + block("x = 2"), "x = 2\n"),
        (block("x = 1") + block("$ run", "bash"), "x = 1\n"),
        (block("x = 1") + block("output", ""), "x = 1\n"),
        (block("x = 1", ""), "x = 1\n"),
        (block("x = 1", "Python"), "x = 1\n"),
        ("```python\nx = 1", "x = 1"),
        ("<think>" + block("x = 1") + "</think>" + block("x = 2"), "x = 2\n"),
        ("<think>" + block("x = 1"), None),
        ("x = 1", None),
        (block("int x;", "cpp"), None),
        (block(""), None),
        ("", None),
    ],
)
def test_the_program_in_a_response(text: str, program: str | None) -> None:
    assert find_program(text) == program


SUM = "print(sum(map(int, input().split())))"
STREAMS = json.dumps({"inputs": ["1 2\n", "3 4\n"], "outputs": ["3\n", "7"]})


@needs_sandbox
@pytest.mark.parametrize(
    "code, whole, share",
    [
        (SUM, 1, 1),
        ("if __name__ == '__main__':\n    " + SUM, 1, 1),
        ("print(3)", 0, 0.5),
        ("print(8)", 0, 0),
        (SUM + "\nraise SystemExit(1)", 0, 0),  # a judge counts that as a crash
        ("a, b = input().split()\n1 / (int(a) - 3)\nprint(int(a) + int(b))", 0, 0.5),
        ("a, b = map(int, input().split())\nwhile a == 3: pass\nprint(a + b)", 0, 0.5),
        ("print(", 0, 0),
        ("import os\nos._exit(0)", 0, 0),
        ("print(open('/proc/self/environ').read())", 0, 0),
        (SUM + "\nwhile True: print('x' * 10000)", 0, 0),
    ],
)
def test_programs_that_read_and_print(
    reward: CodeReward, partial: CodeReward, code: str, whole: float, share: float
) -> None:
    sample = make(block(code), STREAMS)
    assert reward(sample) == whole
    assert partial(sample) == share


CALLS = {"fn_name": "add", "inputs": [[1, 2], [3, 4]], "outputs": [3, 7]}


@needs_sandbox
@pytest.mark.parametrize(
    "code, tests, whole, share",
    [
        ("def add(a, b): return a + b", CALLS, 1, 1),
        ("class Solution:\n    def add(self, a, b): return a + b", CALLS, 1, 1),
        ("def add(a, b):\n    print('noise'); return a + b", CALLS, 1, 1),
        ("def add(a, b): return 3", CALLS, 0, 0.5),
        ("def add(a, b): return str(a + b)", CALLS, 0, 0),
        ("def add(a, b):\n    if a == 1: raise KeyError\n    return a + b", CALLS, 0, 0.5),
        ("def add(a, b): return object()", CALLS, 0, 0),
        ("def plus(a, b): return a + b", CALLS, 0, 0),
        ("import sys\nsys.exit(0)", CALLS, 0, 0),
        ("import os\ndef add(a, b): os._exit(0)", CALLS, 0, 0),
        ("class Same:\n    def __eq__(self, o): return True\ndef add(a, b): return Same()", CALLS, 0, 0),
        # One result in a list, as APPS writes it, and one that is a list.
        ("def f(x): return [x]", {"fn_name": "f", "inputs": [[1]], "outputs": [[1]]}, 1, 1),
        ("def f(x): return x", {"fn_name": "f", "inputs": [[1]], "outputs": [[1]]}, 1, 1),
        ("def f(x): return (x, {1: None})", {"fn_name": "f", "inputs": [[1]], "outputs": [[1, {"1": None}]]}, 1, 1),
        ("def f(x): return 0.1 + 0.2", {"fn_name": "f", "inputs": [[1]], "outputs": [0.3]}, 1, 1),
    ],
)
def test_functions(
    reward: CodeReward, partial: CodeReward, code: str, tests: dict[str, Any], whole: float, share: float
) -> None:
    sample = make(block(code), tests=tests)
    assert reward(sample) == whole
    assert partial(sample) == share


@needs_sandbox
@pytest.mark.parametrize(
    "code, whole, share",
    [
        ("def f(x): return 2 * x", 1, 1),
        ("def f(x): return 2", 0, 0.5),
        ("def f(x): return None", 0, 0),
        ("import sys\ndef f(x): sys.exit(0)", 0, 0),
        ("import os\nos._exit(0)", 0, 0),
        ("print('[true, true]')\nraise SystemExit", 0, 0),
    ],
)
def test_asserts(reward: CodeReward, partial: CodeReward, code: str, whole: float, share: float) -> None:
    sample = make(block(code), json.dumps(["assert f(1) == 2", "assert f(2) == 4"]))
    assert reward(sample) == whole
    assert partial(sample) == share


LIVE = [
    {"input": "[1, 2]\n3", "output": "[1, 2, 3]", "testtype": "functional"},
    {"input": "[]\n1", "output": "[1]", "testtype": "functional"},
]


@needs_sandbox
@pytest.mark.parametrize(
    "label, metadata, code",
    [
        (json.dumps([{"input": "1 2", "output": "3", "testtype": "stdin"}]), {}, SUM),
        ("", {"tests": [{"input": "1 2", "output": "3"}]}, SUM),
        ("", {"tests": LIVE, "fn_name": "f"}, "class Solution:\n    def f(self, xs, x): return xs + [x]"),
        (str({"inputs": ["1 2"], "outputs": ["3"]}), {}, SUM),  # as Python prints it
        (json.dumps({"inputs": [["1 2"]], "outputs": [["3"]]}), {}, SUM),  # lines in a list
        (
            "",
            {"tests": {"assert_case": ["assert sqrt(4) == f(1)"], "import_prefix": "from math import sqrt"}},
            "def f(x): return 2",
        ),
        (
            "",
            {"tests": {"entry_point": "f", "test": "def check(candidate):\n    assert candidate(1) == 2"}},
            "def f(x): return 2",
        ),
        ("assert f(1) == 2", {}, "def f(x): return 2"),
    ],
)
def test_published_forms(reward: CodeReward, label: str, metadata: dict[str, Any], code: str) -> None:
    assert reward(make(block(code), label, **metadata)) == 1.0
    assert reward(make(block("def f(x): pass\nprint()"), label, **metadata)) == 0.0


@pytest.mark.parametrize(
    "label, message",
    [
        ("", "no test cases"),
        ("[]", "no test cases"),
        ("{}", "no test cases: an object with nothing"),
        ("42", "no test cases: '42'"),
        (json.dumps({"inputs": [], "outputs": []}), "0 inputs and 0 outputs"),
        (json.dumps({"inputs": ["1"], "outputs": []}), "1 inputs and 0 outputs"),
        (json.dumps(LIVE), "whose name is not told"),
    ],
)
def test_cases_that_cannot_be_read(label: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        read_cases(label, {})


@needs_sandbox
def test_the_time_of_all_cases_together_is_limited() -> None:
    cases = json.dumps({"inputs": ["1"] * 50, "outputs": ["1"] * 50})
    slow = CodeReward(partial=True, seconds=3, total_seconds=1.0)
    assert 0 < slow(make(block("import time; time.sleep(.3); print(1)"), cases)) < 0.2
    assert CodeReward(partial=True, max_cases=2)(make(block("print(1)"), cases)) == 1.0


@needs_sandbox
def test_no_program_is_no_reward(reward: CodeReward) -> None:
    assert reward(make("I do not know", STREAMS)) == 0.0


@pytest.mark.parametrize(
    "found, expected, same",
    [
        ("1 2\n3\n", "1 2\n3", True),
        ("1 2 \n3\n\n", "1 2\n3", True),
        ("1\n2\n3", "1 2\n3", False),
        ("0.3333333333", "0.33333333", True),
        ("0.34", "0.33333333", False),
        ("1000000000", "1000000001", False),
        ("YES", "yes", False),
        ("nan.", "nan.", True),
        ("", "", True),
        ("1", "", False),
    ],
)
def test_outputs_are_compared_word_by_word(found: str, expected: str, same: bool) -> None:
    assert same_output(found, expected) is same


@pytest.mark.parametrize(
    "found, expected, same",
    [
        (1, 1, True),
        (1, 1.0, True),
        (True, 1, False),
        (10**400, 0.5, False),
        (10**18, 10**18 + 1, False),
        ([1, [2.0000000001]], [1, [2]], True),
        ({"a": [1]}, {"a": [1]}, True),
        ({"a": 1}, {"b": 1}, False),
        ("1", 1, False),
        (None, None, True),
        (None, 0, False),
    ],
)
def test_values_are_compared_by_kind(found: Any, expected: Any, same: bool) -> None:
    assert same_value(found, expected) is same


@needs_sandbox
def test_the_built_in_name_and_its_params() -> None:
    code = load_reward("code", {"partial": True, "seconds": 2.0})
    assert "sandbox for programs" in code.notice  # type: ignore[attr-defined]
    with pytest.raises(UserError, match="unexpected keyword argument 'secnods'"):
        load_reward("code", {"secnods": 2})


def test_a_missing_wall_is_refused_at_the_start(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(landlock, "version", lambda: 1)
    with pytest.raises(UserError, match="cannot be kept from harm here; missing: files"):
        load_reward("code")


def test_checks_run_in_one_program() -> None:
    (only,) = Checks(["assert True"] * 5).runs("x = 1")
    assert only.cases == 5
