"""What a response gives as its answer, and rewards that compare it as text."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Callable, Sequence
from typing import Literal

from megatron_vespo.types import Sample

Where = Literal["whole", "boxed", "line", "tag", "any"]

# Sample.text keeps special tokens, so the stop token that ended the response stands at its end.
_END_TOKENS = re.compile(r"(?:\s|<\|[^<>|]*\|>|</s>|<eos>|<pad>)+\Z")
_ANSWER_LINE = re.compile(r"(?:answer|答案)\s*(?:is|是|为)?\s*[:\uff1a]?[ \t]*([^\n]+)", re.IGNORECASE)
_TAG = re.compile(r"<answer>(.*?)</answer>", re.DOTALL)
_BOX = re.compile(r"\\f?box(?:ed)?\s*\{")
_LETTER = r"[\s\(\[\\{]*(?:text|mathrm|mathbf|textbf)?[\{\(\s]*"
_QUOTED = re.compile(r"[\"'\u201c\u201d\u2018\u2019`*$]+")


def without_end_tokens(text: str) -> str:
    """The response without the tokens that end it and the space around it."""
    return _END_TOKENS.sub("", text).strip()


def response_text(text: str) -> str:
    """The response without the tokens that end it, and without the thoughts before ``</think>``.

    Thoughts that never end are all thoughts: nothing is left.
    """
    text = without_end_tokens(text)
    before, closed, after = text.rpartition("</think>")
    if closed:
        return after.strip()
    return "" if "<think>" in before + after else text


def last_boxed(text: str) -> str | None:
    r"""Content of the last ``\boxed{...}``, braces inside it matched; None: there is none, or it is not closed."""
    matches = list(_BOX.finditer(text))
    if not matches:
        return None
    start = matches[-1].end()
    depth, place = 1, start
    while place < len(text):
        if text[place] == "\\":  # \{ and \} are signs, not braces
            place += 2
            continue
        depth += {"{": 1, "}": -1}.get(text[place], 0)
        if depth == 0:
            return text[start:place].strip()
        place += 1
    return None


def _last_line(text: str) -> str | None:
    found = _ANSWER_LINE.findall(text)
    return found[-1].strip() if found else None


def _last_tag(text: str) -> str | None:
    found = _TAG.findall(text)
    return found[-1].strip() if found else None


_PLACES: dict[str, Sequence[Callable[[str], str | None]]] = {
    "whole": (lambda text: text,),
    "boxed": (last_boxed,),
    "line": (_last_line,),
    "tag": (_last_tag,),
    "any": (last_boxed, _last_tag, _last_line),
}


def find_answer(text: str, where: Where) -> str | None:
    r"""What a response gives as its answer; None: nothing.

    Args:
        text: The response, as ``Sample.text``.
        where: ``whole``: all of it; ``boxed``: the last ``\boxed{}``; ``line``: what follows the last "Answer:";
            ``tag``: the last ``<answer>``; ``any``: the first of boxed, tag and line that is there.

    Raises:
        ValueError: There is no such place.
    """
    if where not in _PLACES:
        raise ValueError(f"answer: {where!r} is none of {', '.join(_PLACES)}")
    response = response_text(text)
    return next((answer for place in _PLACES[where] if (answer := place(response)) is not None), None)


def exact_match(sample: Sample, answer: Where = "whole", ignore_case: bool = False) -> float:
    """1.0 where the answer is the label and nothing else, spaces and end-of-text tokens around it aside; else 0.0.

    Args:
        sample: What to score.
        answer: Where it stands, as of :func:`find_answer`.
        ignore_case: Whether upper and lower case, and full-width signs and their plain ones, are the same.
    """
    # The whole response is compared as it stands: thoughts are no part of a task that asks for nothing but the answer.
    found = without_end_tokens(sample.text) if answer == "whole" else find_answer(sample.text, answer)
    label = sample.prompt.label.strip()
    if found is None:
        return 0.0
    if ignore_case:
        found, label = (unicodedata.normalize("NFKC", text).casefold().strip() for text in (found, label))
    return float(found == label)


def multiple_choice(sample: Sample, letters: str = "ABCDEFGHIJ") -> float:
    r"""1.0 where the choice is the label's letter, else 0.0.

    The choice is the letter in the last ``\boxed{}``, ``<answer>`` or after the last "Answer:" or "the answer is", as
    in ``(B)``, ``B.`` or ``\text{B}``; or the response is the letter alone. A label may be a letter, ``(B)``, or the
    number of the choice, from 0.

    Args:
        sample: What to score.
        letters: Of the choices.
    """
    label = _letter(sample.prompt.label, letters)
    if label is None and sample.prompt.label.strip().isdecimal():
        number = int(sample.prompt.label)
        label = letters[number] if number < len(letters) else None
    if label is None:
        raise ValueError(f"the label {sample.prompt.label!r} is not one of the letters {letters}")
    response = response_text(sample.text)
    given = find_answer(sample.text, "any")
    return float(_letter(response if given is None else given, letters) == label)


def _letter(text: str, letters: str) -> str | None:
    """The letter with which an answer begins, as ``(B)`` and ``B. because`` do, but not ``Because``, ``A dog``."""
    text = unicodedata.normalize("NFKC", _QUOTED.sub("", text)).strip()
    one = f"[{re.escape(letters)}]"
    more = rf"(?!\s*(?:[,;/&]|and|or)\s*[\(\[]?{one}\b)"  # two letters are no choice
    found = re.match(rf"{_LETTER}({one}){more}(?=[\s\)\]\}}.:,;]*\Z|[\)\]\}}.:,;])", text)
    return found[1] if found else None
