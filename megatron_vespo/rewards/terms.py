"""Several rewards as one: which of them a sample gets, and their weighted sum."""

from __future__ import annotations

import asyncio
import inspect
from collections.abc import Awaitable, Callable, Coroutine, Iterator, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING, Any, TypeGuard

from megatron_vespo.rewards.failures import RewardFailure, as_reward
from megatron_vespo.rewards.loader import RewardFunction, load_reward
from megatron_vespo.rewards.protocol import Sum, Term
from megatron_vespo.types import Sample

if TYPE_CHECKING:  # workers do without it: importing pydantic takes longer than all of theirs
    from megatron_vespo.config import RewardSection


@dataclass(frozen=True, slots=True)
class Scoring:
    """What a worker computes.

    Attributes:
        function: Scores a sample: the only term's own function, or one that gives a :class:`Sum`. It is a coroutine
            function where those of all terms are; where some are, it may return an awaitable.
        notices: What people should know, from the functions' attribute ``notice``.
    """

    function: Callable[[Sample], Any]
    notices: list[str]


def terms_of(section: RewardSection) -> list[Term]:
    """What the configuration asks for; a single function is one term without a name."""
    if not section.terms:
        return [Term("", section.function, 1.0, section.params, None)]
    return [Term(term.label, term.function, term.weight, term.params, term.sources) for term in section.terms]


def load_terms(terms: Sequence[Term]) -> Scoring:
    """Import the functions.

    Raises:
        UserError: As :func:`load_reward`.
    """
    functions = [load_reward(term.function, term.params) for term in terms]
    notices = [str(function.notice) for function in functions if hasattr(function, "notice")]
    is_sum = len(terms) > 1 or bool(terms[0].name)
    return Scoring(_add_up(list(zip(terms, functions, strict=True))) if is_sum else functions[0], notices)


def _add_up(weighted: Sequence[tuple[Term, RewardFunction]]) -> Callable[[Sample], Any]:
    async def score_awaiting(sample: Sample) -> Sum:
        return await _awaited([(term, function(sample)) for term, function in _chosen(weighted, sample)])

    def score(sample: Sample) -> Sum | Awaitable[Sum]:
        values = [(term, function(sample)) for term, function in _chosen(weighted, sample)]
        return _awaited(values) if any(inspect.isawaitable(value) for _, value in values) else _sum(values)

    # One that is not awaited would hold up the coroutines of other samples: a worker then takes one sample at a time.
    return score_awaiting if all(is_coroutine_function(function) for _, function in weighted) else score


def is_coroutine_function(function: RewardFunction) -> TypeGuard[Callable[[Sample], Coroutine[Any, Any, Any]]]:
    """Whether calling it makes a coroutine."""
    return inspect.iscoroutinefunction(function) or inspect.iscoroutinefunction(type(function).__call__)


def _chosen(weighted: Sequence[tuple[Term, RewardFunction]], sample: Sample) -> Iterator[tuple[Term, RewardFunction]]:
    """The terms for this sample's data source.

    Raises:
        RewardFailure: Some terms are for certain sources, and none of those is for this one.
    """
    source = sample.prompt.data_source
    chosen = [(term, function) for term, function in weighted if _is_for(term, source)]
    is_known = any(term.sources is not None for term, _ in chosen)
    if not is_known and any(term.sources is not None for term, _ in weighted):
        raise RewardFailure(f"no term of reward.terms has data_source {source!r} among its sources")
    return iter(chosen)


def _is_for(term: Term, source: str) -> bool:
    return term.sources is None or any(fnmatchcase(source, pattern) for pattern in term.sources)


async def _awaited(values: Sequence[tuple[Term, Any]]) -> Sum:
    async def one(value: Any) -> Any:
        return await value if inspect.isawaitable(value) else value

    found = await asyncio.gather(*(one(value) for _, value in values))
    return _sum([(term, value) for (term, _), value in zip(values, found, strict=True)])


def _sum(values: Sequence[tuple[Term, Any]]) -> Sum:
    found = {}
    for term, value in values:
        try:
            found[term.name] = as_reward(value)
        except RewardFailure as failure:
            raise RewardFailure(f"{term.name} {failure}") from None
    return Sum(as_reward(sum(term.weight * found[term.name] for term, _ in values)), found)
