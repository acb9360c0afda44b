r"""The reward of DAPO-Math (arXiv 2503.14476): 1 for the right final answer, 0 otherwise.

The prompt asks for a last line ``Answer: ...``. The last such line counts, or, where there is none, the last
``\boxed{...}``; either must stand in the last 300 characters, so that an answer on the way counts for nothing. It is
normalised and compared exactly; answers of this data set are integers, and integers are compared as numbers.
"""

from __future__ import annotations

import re

from megatron_vespo.types import Sample

_TAIL = 300
_SPECIAL = re.compile(r"<\|[^|<>]*\|>")
_ANSWER_LINE = re.compile(r"answer\s*:[ \t]*([^\n]+)", re.IGNORECASE)
_INTEGER = re.compile(r"[+-]?\d+")
# LaTeX and Markdown that say nothing of the value, in the order in which they go: pattern, replacement.
_DECORATION = (
    (re.compile(r"\\(?:text|textbf|mathrm|mathbf|mbox)\{([^{}]*)\}"), r"\1"),
    (re.compile(r"\\boxed\{([^{}]*)\}"), r"\1"),
    (re.compile(r"\\[()\[\]]|\\[,;:! ]|\\(?:left|right)\b|\\%|\\\$|\^\{?\\circ\}?"), ""),
    (re.compile(r"\*\*|[`$%]"), ""),
    (re.compile(r"(?<=\d),(?=\d{3}(?!\d))|(?<=\d)\{,\}(?=\d{3})"), ""),
)


def reward(sample: Sample) -> float:
    """1 if the response ends with the answer in ``label``."""
    answer = final_answer(sample.text)
    return float(answer is not None and same(answer, str(sample.prompt.label)))


def final_answer(text: str) -> str | None:
    """What a response gives as its answer, as it stands there; None where it gives none."""
    tail = _SPECIAL.sub("", text).rstrip()[-_TAIL:]
    lines = _ANSWER_LINE.findall(tail)
    return lines[-1] if lines else last_boxed(tail)


def last_boxed(text: str) -> str | None:
    r"""Content of the last ``\boxed{...}``, braces inside it matched; None where it is not closed."""
    start = text.rfind("\\boxed{")
    if start < 0:
        return None
    depth = 0
    for place in range(start + len("\\boxed"), len(text)):
        depth += {"{": 1, "}": -1}.get(text[place], 0)
        if depth == 0:
            return text[start + len("\\boxed{") : place]
    return None


def same(answer: str, label: str) -> bool:
    """Whether they are equal once decoration is gone."""
    given, right = normalise(answer), normalise(label)
    if _INTEGER.fullmatch(given) and _INTEGER.fullmatch(right):
        return int(given) == int(right)
    return given == right and given != ""


def normalise(answer: str) -> str:
    """Without dollars, text commands, thousands separators, blanks, ``x =`` and a full stop."""
    for pattern, replacement in _DECORATION:
        answer = pattern.sub(replacement, answer)
    answer = answer.split("=")[-1]
    return "".join(answer.split()).rstrip(".")
