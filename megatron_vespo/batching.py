"""Cutting a rollout batch into minibatches, and a minibatch into packed microbatches for every data-parallel rank."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from megatron_vespo.errors import UserError


def split_minibatches[T](samples: Sequence[T], n: int) -> list[list[T]]:
    """``n`` contiguous minibatches with equally many samples each, in order.

    Raises:
        UserError: ``n`` is not positive or does not divide the number of samples, or there are none.
    """
    if n < 1 or not samples or len(samples) % n:
        raise UserError(f"cannot split {len(samples)} samples into {n} equal minibatches")
    size = len(samples) // n
    return [list(samples[i : i + size]) for i in range(0, len(samples), size)]


@dataclass(frozen=True, slots=True)
class MicrobatchPlan:
    """Which samples each data-parallel rank packs together.

    Attributes:
        ranks: For each rank its K microbatches, each an ascending list of sample indices.
        efficiency: Lock-step efficiency: sum of all costs / (dp_size * sum over k of the slowest rank's k-th cost).
            1 means that no rank ever waits for another.
    """

    ranks: list[list[list[int]]]
    efficiency: float

    @property
    def num_microbatches(self) -> int:
        """K, the same on every rank."""
        return len(self.ranks[0])


def plan_microbatches(
    lengths: Sequence[int],
    dp_size: int,
    max_tokens: int,
    cost: Callable[[int], float] = float,
    names: Sequence[str] | None = None,
) -> MicrobatchPlan:
    """Pack samples into microbatches so that the data-parallel ranks work in lock step.

    Invariants: every sample lies in exactly one microbatch; every rank has the same number K of microbatches; no
    microbatch holds more than ``max_tokens`` tokens; no microbatch is empty where there are at least dp_size * K
    samples (with fewer, the empty ones are the last of their rank); the same arguments give the same plan. K is the
    smallest for which one of two packings succeeds, balanced (longest processing time first) or tight (best fit
    decreasing), so never more than best fit decreasing needs.

    Args:
        lengths: Tokens of each sample, prompt and response, >= 1.
        dp_size: Data-parallel ranks.
        max_tokens: Limit of each microbatch's tokens.
        cost: Time a sample of some length takes, in any unit, >= 0; tokens by default.
        names: What error messages call the samples; their indices by default.

    Raises:
        UserError: A sample is longer than the limit, or there are fewer samples than ranks.
        ValueError: A length is below 1.
    """
    if dp_size < 1 or max_tokens < 1:
        raise UserError(f"dp_size and max_tokens must be positive, got {dp_size} and {max_tokens}")
    if len(lengths) < dp_size:
        raise UserError(
            f"{len(lengths)} samples cannot keep {dp_size} data-parallel ranks busy; use larger minibatches"
        )
    for index, length in enumerate(lengths):
        if length < 1:
            raise ValueError(f"sample {index} has {length} tokens")
        if length > max_tokens:
            name = names[index] if names is not None else str(index)
            raise UserError(f"sample {name} has {length} tokens, more than the {max_tokens} a microbatch may hold")

    costs = [float(cost(length)) for length in lengths]
    k = math.ceil(sum(lengths) / (dp_size * max_tokens))
    while True:
        bins = _pack_balanced(lengths, costs, dp_size * k, max_tokens) or _pack_tight(lengths, dp_size * k, max_tokens)
        if bins is not None:
            return _deal(bins, costs, dp_size)
        k += 1


def _pack_balanced(
    lengths: Sequence[int], costs: Sequence[float], bins: int, max_tokens: int
) -> list[list[int]] | None:
    """Costliest sample first, each into the cheapest bin that has room; None where one finds none."""
    order = sorted(range(len(lengths)), key=lambda i: (-costs[i], i))
    load, content = np.zeros(bins), np.zeros(bins, dtype=np.int64)
    packed: list[list[int]] = [[] for _ in range(bins)]
    for i in order:
        # An empty bin is preferred even to a filled one that costs nothing.
        open_load = np.where(content + lengths[i] <= max_tokens, np.where(content > 0, load, -1.0), np.inf)
        best = int(open_load.argmin())
        if np.isinf(open_load[best]):
            return None
        packed[best].append(i)
        load[best] += costs[i]
        content[best] += lengths[i]
    return packed


def _pack_tight(lengths: Sequence[int], bins: int, max_tokens: int) -> list[list[int]] | None:
    """Longest sample first, each into the fullest bin that has room, while every bin can still get a sample."""
    order = sorted(range(len(lengths)), key=lambda i: (-lengths[i], i))
    content = np.zeros(bins, dtype=np.int64)
    packed: list[list[int]] = [[] for _ in range(bins)]
    for done, i in enumerate(order):
        allowed = content + lengths[i] <= max_tokens
        if len(order) - done <= np.count_nonzero(content == 0):
            allowed &= content == 0
        best = int(np.where(allowed, content, -1).argmax())
        if not allowed[best]:
            return None
        packed[best].append(i)
        content[best] += lengths[i]
    return packed


def _deal(bins: list[list[int]], costs: Sequence[float], dp_size: int) -> MicrobatchPlan:
    """Give bins of like cost to the ranks as their k-th microbatch, the costliest first and empty ones last."""
    weighed = [(math.fsum(costs[i] for i in members), sorted(members)) for members in bins]
    weighed.sort(key=lambda item: (not item[1], -item[0], item[1]))
    slots = [weighed[start : start + dp_size] for start in range(0, len(weighed), dp_size)]
    # The first of a slot is its costliest.
    lockstep = dp_size * math.fsum(slot[0][0] for slot in slots)
    ranks = [[slot[rank][1] for slot in slots] for rank in range(dp_size)]
    return MicrobatchPlan(ranks, math.fsum(costs) / lockstep if lockstep > 0 else 1.0)
