"""Test cases of programs, in the forms in which code sets are published, and what passes them.

Expected outputs do not enter the sandbox where the form permits it: what a program prints or returns is compared
outside.
"""

from __future__ import annotations

import ast
import json
import math
import secrets
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol, Self

from megatron_vespo.rewards.sandbox.run import Outcome

TOLERANCE = 1e-6


@dataclass(frozen=True, slots=True)
class Run:
    """One run of a program in the sandbox.

    Attributes:
        program: What to run.
        stdin: What it reads.
        cases: That it decides.
        count_right: How many of them passed, by the run's outcome.
    """

    program: str
    stdin: str
    cases: int
    count_right: Callable[[Outcome], int]


class Cases(Protocol):
    """Test cases of one prompt."""

    def __len__(self) -> int: ...

    def first(self, number: int | None) -> Self:
        """The first so many; None: all."""
        ...

    def runs(self, program: str) -> Iterator[Run]:
        """Runs of this program that decide all cases."""
        ...


@dataclass(frozen=True)
class StreamCases:
    """What a program reads from standard input, and what it must print."""

    inputs: Sequence[str]
    outputs: Sequence[str]

    def __len__(self) -> int:
        return len(self.inputs)

    def first(self, number: int | None) -> Self:
        """The first so many; None: all."""
        return replace(self, inputs=self.inputs[:number], outputs=self.outputs[:number])

    def runs(self, program: str) -> Iterator[Run]:
        """A run for each case."""
        for given, expected in zip(self.inputs, self.outputs, strict=True):

            def count(outcome: Outcome, expected: str = expected) -> int:
                return int(outcome.succeeded and same_output(outcome.stdout, expected))

            yield Run(program, given, 1, count)


@dataclass(frozen=True)
class CallCases:
    """Arguments of a function, or of a method of ``Solution``, and what it must return."""

    name: str
    arguments: Sequence[Sequence[Any]]
    results: Sequence[Any]

    def __len__(self) -> int:
        return len(self.arguments)

    def first(self, number: int | None) -> Self:
        """The first so many; None: all."""
        return replace(self, arguments=self.arguments[:number], results=self.results[:number])

    def runs(self, program: str) -> Iterator[Run]:
        """One run for all cases."""
        mark = secrets.token_hex(16)
        content = json.dumps({"mark": mark, "program": program, "name": self.name, "arguments": self.arguments})

        def count(outcome: Outcome) -> int:
            found = _marked(outcome, mark)
            pairs = zip(found, self.results, strict=False)
            return sum(len(result) == 1 and _is_result(result[0], expected) for result, expected in pairs)

        yield Run(_CALLER, content, len(self), count)


@dataclass(frozen=True)
class Checks:
    """Statements, mostly ``assert``, that must not raise.

    They run beside the program, which could deceive them: by an object that is equal to everything, say.
    """

    statements: Sequence[str]
    setup: str = ""

    def __len__(self) -> int:
        return len(self.statements)

    def first(self, number: int | None) -> Self:
        """The first so many; None: all."""
        return replace(self, statements=self.statements[:number])

    def runs(self, program: str) -> Iterator[Run]:
        """One run for all of them."""
        mark = secrets.token_hex(16)
        program = f"{self.setup}\n{program}"
        content = json.dumps({"mark": mark, "program": program, "statements": list(self.statements)})
        yield Run(_CHECKER, content, len(self), lambda outcome: sum(found is True for found in _marked(outcome, mark)))


# The program may print and exit as it likes: only the line behind the mark counts, which the program is not told.
_HEAD = """
import io, json, sys
task = json.loads(sys.stdin.read())
sys.stdin = io.StringIO()
space = {"__name__": "__main__"}
found = []
def tell(write=sys.__stdout__.write, flush=sys.__stdout__.flush, mark=task.pop("mark"), dumps=json.dumps):
    write("\\n" + mark + dumps(found) + "\\n")
    flush()
exec(compile(task["program"], "program.py", "exec"), space)
"""
_CALLER = (
    _HEAD
    + """
name = task["name"]
function = space[name] if name in space else getattr(space["Solution"](), name)
for arguments in task["arguments"]:
    try:
        result = [function(*arguments)]
        json.dumps(result)
    except Exception:
        result = []
    found.append(result)
tell()
"""
)
_CHECKER = (
    _HEAD
    + """
for statement in task["statements"]:
    try:
        exec(compile(statement, "test.py", "exec"), space)
        found.append(True)
    except Exception:
        found.append(False)
tell()
"""
)


def _marked(outcome: Outcome, mark: str) -> list[Any]:
    for line in reversed(outcome.stdout.splitlines()):
        if line.startswith(mark):
            try:
                found = json.loads(line[len(mark) :])
            except ValueError:
                return []
            return found if isinstance(found, list) else []
    return []


def read_cases(label: str, metadata: Mapping[str, Any]) -> Cases:
    """Test cases from the metadata's ``tests``, else from the label, which is JSON or Python's way to write the same.

    - ``{"inputs": [...], "outputs": [...]}``: standard input and output (APPS, TACO, Eurus); with ``"fn_name"`` the
      arguments of that function and its results.
    - ``[{"input": ..., "output": ..., "testtype": "stdin" | "functional"}, ...]`` (LiveCodeBench); the function's
      name is the metadata's ``fn_name`` or ``func_name``, or stands in a case's own ``metadata``.
    - ``["assert f(1) == 2", ...]`` or ``{"assert_case": [...], "import_prefix": ...}`` (MBPP and others).
    - ``{"entry_point": "f", "test": "def check(candidate): ..."}`` (HumanEval).

    Raises:
        ValueError: There are none, or in none of these forms.
    """
    content = metadata.get("tests") or label
    if isinstance(content, str):
        content = _read_text(content)
    if isinstance(content, dict):
        return _of_object(content)
    if isinstance(content, list) and content:
        if all(isinstance(item, str) for item in content):
            return Checks(content)
        if all(isinstance(item, dict) and {"input", "output"} <= item.keys() for item in content):
            name = metadata.get("fn_name") or metadata.get("func_name")
            return _of_list(content, name)
    raise ValueError(f"no test cases: {str(content)[:100]!r}")


def _read_text(text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError:
        pass
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return [text] if "assert" in text else text


def _of_object(content: dict[str, Any]) -> Cases:
    if {"inputs", "outputs"} <= content.keys():
        inputs, outputs = content["inputs"], content["outputs"]
        if not inputs or len(inputs) != len(outputs):
            raise ValueError(f"test cases: {len(inputs)} inputs and {len(outputs)} outputs")
        if name := content.get("fn_name"):
            return CallCases(name, list(map(_arguments, inputs)), outputs)
        return StreamCases(list(map(_lines, inputs)), list(map(_lines, outputs)))
    if content.get("assert_case"):
        return Checks(list(content["assert_case"]), content.get("import_prefix") or "")
    if {"entry_point", "test"} <= content.keys():
        return Checks([f"{content['test']}\ncheck({content['entry_point']})"], content.get("prompt") or "")
    raise ValueError(f"no test cases: an object with {', '.join(content) or 'nothing'}")


def _of_list(content: list[dict[str, Any]], name: str | None) -> Cases:
    inputs, outputs = [item["input"] for item in content], [item["output"] for item in content]
    if all(item.get("testtype", "stdin") == "stdin" for item in content):
        return StreamCases(list(map(_lines, inputs)), list(map(_lines, outputs)))
    name = name or next((item["metadata"]["func_name"] for item in content if item.get("metadata")), None)
    if not name:
        raise ValueError("test cases of a function whose name is not told: no fn_name in the metadata")
    return CallCases(name, list(map(_arguments, inputs)), [_value(output) for output in outputs])


def _lines(value: Any) -> str:
    return "\n".join(map(str, value)) if isinstance(value, list) else str(value)


def _value(text: Any) -> Any:
    try:
        return json.loads(text) if isinstance(text, str) else text
    except ValueError:
        return text


def _arguments(given: Any) -> list[Any]:
    """A list of arguments as it is; text as LiveCodeBench has it, one argument a line in JSON."""
    if isinstance(given, str):
        return [_value(line) for line in given.splitlines()]
    return given if isinstance(given, list) else [given]


def _is_result(found: Any, expected: Any) -> bool:
    # APPS writes a result as a list that holds it.
    is_held = isinstance(expected, list) and len(expected) == 1 and same_value(found, expected[0])
    return is_held or same_value(found, expected)


def same_value(found: Any, expected: Any) -> bool:
    """Whether two JSON-like values are equal; floats to a relative 1e-6."""
    if isinstance(found, bool) or isinstance(expected, bool):
        return found is expected
    if isinstance(found, int | float) and isinstance(expected, int | float):
        is_float = isinstance(found, float) or isinstance(expected, float)
        return found == expected or (is_float and _is_close(found, expected))
    if isinstance(found, list) and isinstance(expected, list):
        return len(found) == len(expected) and all(map(same_value, found, expected))
    if isinstance(found, dict) and isinstance(expected, dict):
        return found.keys() == expected.keys() and all(same_value(found[key], expected[key]) for key in found)
    return type(found) is type(expected) and found == expected


def same_output(found: str, expected: str) -> bool:
    """Whether two outputs are equal, line by line and word by word; words with a decimal point as numbers to 1e-6."""
    lines = [[line.split() for line in text.strip().splitlines()] for text in (found, expected)]
    if [len(words) for words in lines[0]] != [len(words) for words in lines[1]]:
        return False
    pairs = zip(*([word for words in text for word in words] for text in lines), strict=True)
    return all(left == right or _same_number(left, right) for left, right in pairs)


def _is_close(left: float, right: float) -> bool:
    try:
        return math.isclose(left, right, rel_tol=TOLERANCE, abs_tol=TOLERANCE)
    except OverflowError:  # an integer that no float can hold
        return False


def _same_number(left: str, right: str) -> bool:
    if "." not in left + right:
        return False
    try:
        return _is_close(float(left), float(right))
    except ValueError:
        return False
