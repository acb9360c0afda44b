"""Rewards for the form of a response, to be added to one for its answer."""

from __future__ import annotations

import re
from collections.abc import Sequence

from megatron_vespo.rewards.answers import without_end_tokens
from megatron_vespo.types import FINISH_LENGTH, Sample


def overlong(sample: Sample, max_tokens: int, buffer_tokens: int) -> float:
    """DAPO's soft punishment of length (arXiv 2503.14476, equation 13): 0, then falling to -1 over the buffer.

    Args:
        sample: What to score.
        max_tokens: Response tokens from which on it is -1 (L_max); mostly ``rollout.max_new_tokens``.
        buffer_tokens: Tokens before that over which it falls (L_cache).

    Raises:
        ValueError: The buffer is not between 1 and ``max_tokens``.
    """
    if not 0 < buffer_tokens <= max_tokens:
        raise ValueError(f"buffer_tokens={buffer_tokens} must be from 1 to max_tokens={max_tokens}")
    over = len(sample.response_ids) - (max_tokens - buffer_tokens)
    return -min(max(over / buffer_tokens, 0.0), 1.0)


def truncated(sample: Sample) -> float:
    """1.0 where the response was cut at the length limit, else 0.0; for a negative weight."""
    return float(sample.finish_reason == FINISH_LENGTH)


def format_rule(sample: Sample, pattern: str = "", tags: Sequence[str] = ()) -> float:
    """1.0 where the response has the form that is asked for, else 0.0.

    Args:
        sample: What to score.
        pattern: A regular expression (``.`` takes line ends too) that the whole response must match, end tokens aside.
        tags: Each must be there once, opened and closed, in this order, as ``[think, answer]`` asks for
            ``<think>...</think>...<answer>...</answer>`` with nothing but space outside.

    Raises:
        ValueError: Neither was given, or the pattern is none.
    """
    if not pattern and not tags:
        raise ValueError("format needs params: pattern, or tags")
    text = without_end_tokens(sample.text)
    try:
        if pattern and not re.fullmatch(pattern, text, re.DOTALL):
            return 0.0
    except re.error as error:
        raise ValueError(f"pattern {pattern!r} is no regular expression: {error}") from None
    return float(_has_tags(text, tags))


def _has_tags(text: str, tags: Sequence[str]) -> bool:
    marks = [mark for tag in tags for mark in (f"<{tag}>", f"</{tag}>")]
    if any(text.count(mark) != 1 for mark in marks):
        return False
    places = [text.index(mark) for mark in marks]
    if not marks:
        return True
    outside = [text[: places[0]]]
    for end, mark, begin in zip(places[1::2], marks[1::2], [*places[2::2], len(text)], strict=True):
        outside.append(text[end + len(mark) : begin])
    return places == sorted(places) and not "".join(outside).strip()
