r"""Mathematical answers, compared by value with the library math-verify (https://github.com/huggingface/Math-Verify).

math-verify reads LaTeX and plain expressions, and SymPy decides whether two are equal: ``\frac{1}{2}`` is 0.5, sets
have no order, ``5\text{ cm}`` is 5, an open interval is not the closed one. SymPy may think for ever; a signal then
stops it. What no signal stops is killed with its worker after ``reward.timeout``. Either way the sample is not scored.
"""

from __future__ import annotations

import logging
import signal
from collections.abc import Callable
from typing import Any, Literal

import math_verify
from math_verify.errors import TimeoutException

from megatron_vespo.rewards.answers import last_boxed, response_text
from megatron_vespo.rewards.failures import RewardFailure
from megatron_vespo.types import Sample

# It warns of every answer that it cannot read, which is the model's business.
logging.getLogger("math_verify").setLevel(logging.ERROR)
logging.getLogger("latex2sympy2_extended").setLevel(logging.ERROR)

# Seconds after which an alarm is raised again.
_AGAIN = 1.0
_FORMS = (math_verify.LatexExtractionConfig(boxed_match_priority=0), math_verify.ExprExtractionConfig())


def math_answer(sample: Sample, answer: Literal["anywhere", "boxed"] = "anywhere", seconds: int = 5) -> float:
    r"""1.0 where the response's answer equals the label, else 0.0.

    The last ``\boxed{}`` counts; without one, with ``answer: anywhere``, what math-verify's extraction finds: "the
    final answer is ...", LaTeX between dollars, or the last number. Thoughts before ``</think>`` do not count.

    Args:
        sample: What to score.
        answer: Where the answer may stand.
        seconds: That SymPy may think, for the label, the answer and their comparison each.

    Raises:
        RewardFailure: SymPy took longer.
        ValueError: The label cannot be read, or ``answer`` is none of the two.
    """
    if answer not in ("anywhere", "boxed"):
        raise ValueError(f"answer: {answer!r} is neither anywhere nor boxed")
    label = sample.prompt.label.strip()
    response = response_text(sample.text)
    boxed = last_boxed(response)
    if boxed is None and (answer == "boxed" or "\\boxed{" in response):  # a box that is not closed is no answer
        return 0.0
    if boxed is not None and boxed == (last_boxed(label) or label):
        return float(bool(boxed))  # nothing to think about
    try:
        gold = _parse(label if "\\boxed" in label else f"\\boxed{{{label}}}", seconds)
        given = _parse(response if boxed is None else f"\\boxed{{{boxed}}}", seconds)
        if not gold:
            raise ValueError(f"the label {label!r} is no mathematical answer")
        return float(bool(given) and _equal(gold, given, seconds))
    except TimeoutException:
        raise RewardFailure(f"SymPy took longer than {seconds} s to compare {(boxed or response)[-100:]!r}") from None


def _parse(text: str, seconds: int) -> list[Any]:
    try:
        return _within(seconds, lambda: math_verify.parse(text, _FORMS, parsing_timeout=0, raise_on_error=True))
    except Exception:  # noqa: BLE001 - SymPy raises anything at what is no expression: there is no answer then
        return []


def _equal(gold: list[Any], given: list[Any], seconds: int) -> bool:
    try:
        return _within(seconds, lambda: math_verify.verify(gold, given, timeout_seconds=None, raise_on_error=True))
    except Exception:  # noqa: BLE001 - as above: what cannot be compared is not equal
        return False


def _within[T](seconds: int, think: Callable[[], T]) -> T:
    """What ``think`` returns, in the main thread.

    math-verify's own alarm rings once, and was seen to be lost, as it is where Python happens to be in a callback then
    or SymPy in an ``except`` of everything; so this one rings again.

    Raises:
        TimeoutException: It takes longer.
    """
    thinks = True

    def stop(number: int, frame: object) -> None:
        if thinks:
            raise TimeoutException

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, seconds, _AGAIN)
    try:
        try:
            return think()
        finally:
            thinks = False
    finally:  # should the alarm ring in the line before
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
