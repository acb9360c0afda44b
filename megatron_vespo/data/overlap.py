r"""Whether two problems are the same: normalised text, and n-grams of its tokens.

Normalised text is lower-case and without LaTeX's means of layout, quotation marks, punctuation and spaces; operators
stay, since x + 1 and x - 1 are different problems.
"""

from __future__ import annotations

import re
import unicodedata
from collections import Counter, defaultdict
from collections.abc import Iterable
from functools import lru_cache

NGRAM = 8
"""Tokens in a row that are compared: words, numbers, operators, and single letters of scripts without spaces."""
OVERLAP = 0.5
"""A training problem that holds this share of the n-grams of an evaluation problem counts as the same."""

# In the order in which they are replaced.
_LATEX = (
    (re.compile(r"\\(?:left|right|displaystyle|textstyle|limits|quad|qquad|big|Big)\b"), " "),
    (re.compile(r"\\(?:text|textbf|textit|mathrm|mathbf|mbox|emph|operatorname)\s*(?=\{)"), " "),
    (re.compile(r"\\[dt]frac\b"), r"\\frac"),
    (re.compile(r"\\(?:cdot|times)\b"), "*"),
    (re.compile(r"\\(?:leq?|leqslant)\b"), "<="),
    (re.compile(r"\\(?:geq?|geqslant)\b"), ">="),
    (re.compile(r"\\[,;:! ()\[\]]"), " "),
)
_TOKEN = re.compile(r"[a-z]+|\d+|[-+*/=<>^|!%]|[^\W\d_a-z]")


def tokens(text: str) -> list[str]:
    """The normalised text as tokens."""
    text = unicodedata.normalize("NFKC", text)
    for pattern, replacement in _LATEX:
        text = pattern.sub(replacement, text)
    return _TOKEN.findall(text.lower())


@lru_cache(maxsize=1 << 15)  # some sets have each problem a hundred times
def normalise(text: str) -> str:
    """The normalised text; equal for equal problems."""
    return " ".join(tokens(text))


class HeldOut:
    """The evaluation problems, to be looked for in training problems.

    Args:
        problems: (name, text) of each.
        ngram: Tokens of an n-gram. Problems with fewer are found by their whole text alone.
        overlap: See ``OVERLAP``.
    """

    def __init__(self, problems: Iterable[tuple[str, str]], ngram: int = NGRAM, overlap: float = OVERLAP) -> None:
        self._ngram, self._overlap = ngram, overlap
        self._texts: dict[str, str] = {}
        self._holders: dict[tuple[str, ...], list[str]] = defaultdict(list)
        self._sizes: dict[str, int] = {}
        for name, text in problems:
            self._texts.setdefault(normalise(text), name)
            grams = self._grams(text)
            self._sizes[name] = len(grams)
            for gram in grams:
                self._holders[gram].append(name)

    def find(self, text: str) -> tuple[str, float] | None:
        """(name of the evaluation problem that this is, share of its n-grams that are here), or None."""
        whole = self._texts.get(normalise(text))
        if whole is not None:
            return whole, 1.0
        shared = Counter(name for gram in self._grams(text) for name in self._holders.get(gram, ()))
        shares = {name: count / self._sizes[name] for name, count in shared.items()}
        best = max(shares, key=lambda name: shares[name], default=None)
        return (best, shares[best]) if best is not None and shares[best] >= self._overlap else None

    def _grams(self, text: str) -> set[tuple[str, ...]]:
        found = tokens(text)
        return {tuple(found[i : i + self._ngram]) for i in range(len(found) - self._ngram + 1)}
