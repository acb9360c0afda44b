"""A reward for programs: the Python in a response, run against test cases in the sandbox."""

from __future__ import annotations

import re
import time
from collections.abc import Sequence

from megatron_vespo.rewards.answers import response_text
from megatron_vespo.rewards.code_cases import Cases, read_cases
from megatron_vespo.rewards.sandbox.run import Limits, Sandbox, Wall
from megatron_vespo.types import Sample

_BLOCK = re.compile(r"```[ \t]*(\w*)[^\n]*\n(.*?)(?:```|\Z)", re.DOTALL)
_PYTHON = {"python", "py", "python3"}
MEBIBYTE = 1 << 20


class CodeReward:
    """Share of the test cases that the response's program passes, or whether it passes all.

    The program is the last block of Python in the response. Its test cases are those of the label or of the metadata's
    ``tests`` (:func:`read_cases`). A response without a program gets 0; test cases that cannot be read are an error.

    Args:
        partial: Whether a program that passes some cases gets their share; otherwise it gets 0, and cases after the
            first that fails are not run.
        max_cases: Only so many, the first; None: all.
        cpu_seconds: Of the processor, for each run of the program.
        seconds: Of time, for each run.
        total_seconds: Of time, for all runs together, less than ``reward.timeout``; cases not reached have failed.
        memory_mib: Mebibytes of address space.
        output_mib: Mebibytes that a run may print.
        without: Required walls of the sandbox that may be missing.
        packages: Whether programs may import the packages installed beside Python, such as numpy.
        python: Interpreter that runs the programs.
    """

    def __init__(
        self,
        partial: bool = False,
        max_cases: int | None = None,
        cpu_seconds: float = 10.0,
        seconds: float = 15.0,
        total_seconds: float = 45.0,
        memory_mib: int = 1024,
        output_mib: int = 4,
        without: Sequence[Wall] = (),
        packages: bool = False,
        python: str | None = None,
    ) -> None:
        self._partial, self._max_cases, self._total_seconds = partial, max_cases, total_seconds
        limits = Limits(cpu_seconds, seconds, memory_mib * MEBIBYTE, output_mib * MEBIBYTE)
        self._sandbox = Sandbox(limits, tuple(without), packages, python)
        self.notice = self._sandbox.check()

    def __call__(self, sample: Sample) -> float:
        """The sample's reward, from 0 to 1.

        Raises:
            RewardFailure: The program could not be run.
            ValueError: The test cases cannot be read.
        """
        cases = read_cases(sample.prompt.label, sample.prompt.metadata).first(self._max_cases)
        program = find_program(sample.text)
        if program is None:
            return 0.0
        passed = self._passed(program, cases)
        return passed / len(cases) if self._partial else float(passed == len(cases))

    def _passed(self, program: str, cases: Cases) -> int:
        deadline, passed = time.monotonic() + self._total_seconds, 0
        for run in cases.runs(program):
            if time.monotonic() > deadline:
                break
            outcome = self._sandbox.run(run.program, run.stdin)
            right = run.count_right(outcome)
            passed += right
            if right < run.cases and not self._partial:
                break
        return passed


def find_program(text: str) -> str | None:
    """The last block of Python in a response, else the last block without a language; None: there is none.

    A block that is cut off at the response's end counts.
    """
    blocks = _BLOCK.findall(response_text(text))
    for languages in (_PYTHON, {""}):
        found = [code for language, code in blocks if language.lower() in languages and code.strip()]
        if found:
            return found[-1]
    return None
