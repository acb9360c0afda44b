"""Cutting a rollout batch into minibatches, and a minibatch into packed microbatches for every data-parallel rank.

How microbatches are planned: the ranks' k-th microbatches form a slot, and a slot takes as long as its costliest. For a
number K the dp_size * K longest samples open one microbatch each, alike ones in the same slot. A slot's ceiling is its
costliest sample, or where that is higher a level common to all slots, just so high that the other samples find room
below the ceilings and the token limit. Those follow, longest first, each into the microbatch with the least room that
still takes it (tight) or into the one with the most (balanced). Then the costliest microbatch of each slot swaps
samples with the others of its slot while that evens the slot out. Both ways are tried for the smallest K that can be
packed and for the next, and the plan that takes the least time wins.
"""

from __future__ import annotations

import bisect
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import chain

import numpy as np
from numpy.typing import NDArray

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


type _Array = NDArray[np.float64]

# How many K are compared, from the smallest that can be packed up: a third one gains nothing that can be measured.
_NUMBERS_COMPARED = 2
# Part of the ideal time that another K must be able to save to be worth planning.
_WORTHWHILE = 3e-3
# Excess of a slot's costliest microbatch over the mean at which the slot is even.
_EVEN = 1e-3


def plan_microbatches(
    lengths: Sequence[int],
    dp_size: int,
    max_tokens: int,
    cost: Callable[[int], float] = float,
    names: Sequence[str] | None = None,
    *,
    multiple_of: int = 1,
    overhead_tokens: int = 256,
) -> MicrobatchPlan:
    """Pack samples into microbatches so that the data-parallel ranks work in lock step.

    Invariants: every sample lies in exactly one microbatch; every rank has the same number K of microbatches, a
    multiple of ``multiple_of``; no microbatch holds more than ``max_tokens`` tokens; no rank is empty, and no
    microbatch is where there are at least dp_size * K samples (with fewer, which only the limit or ``multiple_of``
    can force, the empty ones are the last of their rank); the same arguments give the same plan, and samples in another
    order the same lengths in the same places.

    Args:
        lengths: Tokens of each sample, prompt and response, >= 1.
        dp_size: Data-parallel ranks.
        max_tokens: Limit of each microbatch's tokens.
        cost: Time a sample of some length takes, in any unit, >= 0 and growing with the length; tokens by default.
        names: What error messages call the samples; their indices by default.
        multiple_of: K is a multiple of it; the interleaved pipeline schedule needs multiples of the pipeline size.
        overhead_tokens: A microbatch takes, besides its samples, as long as one sample of so many tokens: kernel
            launches, latency of the collectives, small matrix products. 256 is 1.6 % of a microbatch of 16,384.

    Raises:
        UserError: A sample is longer than the limit, or there are fewer samples than ranks.
        ValueError: A length is below 1.
    """
    _check(lengths, dp_size, max_tokens, names, multiple_of)
    order = sorted(range(len(lengths)), key=lambda i: (-lengths[i], i))
    lengths = [lengths[i] for i in order]
    costs = [float(cost(length)) for length in lengths]
    overhead = float(cost(overhead_tokens))
    least = math.fsum(costs) / dp_size
    k = math.ceil(sum(lengths) / (dp_size * max_tokens * multiple_of)) * multiple_of
    best: list[_Slot] = []
    best_time, compared = math.inf, 0
    while not best or (
        compared < _NUMBERS_COMPARED
        and dp_size * k <= len(lengths)
        and (1 + _WORTHWHILE) * (least + k * overhead) < best_time
    ):
        for tight in (True, False):
            bins = _pack(lengths, costs, dp_size * k, dp_size, max_tokens, tight)
            slots = [_even_out(slot, lengths, costs, max_tokens) for slot in _deal(bins, costs, dp_size)]
            time = _time(slots) + k * overhead
            if bins and time < best_time:
                best, best_time = slots, time
        compared += bool(best)
        k += multiple_of
    ranks = [[sorted(order[i] for i in slot[rank][1]) for slot in best] for rank in range(dp_size)]
    return MicrobatchPlan(ranks, least / _time(best) if least > 0 else 1.0)


# For each rank the cost and the samples of its microbatch.
type _Slot = list[tuple[float, list[int]]]


def _check(
    lengths: Sequence[int], dp_size: int, max_tokens: int, names: Sequence[str] | None, multiple_of: int
) -> None:
    if min(dp_size, max_tokens, multiple_of) < 1:
        raise UserError(
            f"dp_size, max_tokens and multiple_of must be positive, got {dp_size}, {max_tokens} and {multiple_of}"
        )
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


def _pack(
    lengths: Sequence[int], costs: Sequence[float], number: int, dp_size: int, max_tokens: int, tight: bool
) -> list[list[int]]:
    """Samples, longest first, into a number of bins; no bins at all where some sample finds no room."""
    opening, rest = range(len(lengths))[:number], range(len(lengths))[number:]
    bins = [[i] for i in opening] + [[] for _ in range(number - len(opening))]
    if not rest:
        return bins
    free = [max_tokens - lengths[i] for i in opening]
    spare_tokens = sum(lengths[i] for i in rest)
    if spare_tokens > sum(free):
        return []
    spare_cost = math.fsum(costs[i] for i in rest)
    # Free tokens as cost, at the rate of the samples that may come.
    rate = spare_cost / spare_tokens
    load = np.array([costs[i] for i in opening])
    gap = (_ceilings(load, rate * np.array(free), spare_cost, dp_size) - load).tolist()

    # Ascending by room: what is left of both the gap to the ceiling and the tokens.
    rooms = sorted((min(gap[b], rate * free[b]), b) for b in range(number))
    for i in rest:
        enough = bisect.bisect_left(rooms, (costs[i],))
        places = chain(range(enough, number), range(enough)[::-1]) if tight else range(number)[::-1]
        place = next((place for place in places if free[rooms[place][1]] >= lengths[i]), None)
        if place is None:
            return []
        _, b = rooms.pop(place)
        bins[b].append(i)
        free[b] -= lengths[i]
        gap[b] -= costs[i]
        bisect.insort(rooms, (min(gap[b], rate * free[b]), b))
    return bins


def _ceilings(load: _Array, spare: _Array, wanted: float, dp_size: int) -> _Array:
    """What each bin may cost: its slot's costliest load, or the level at which all bins together take ``wanted``.

    Args:
        load: [bins], cost so far, a slot's bins side by side.
        spare: [bins], cost that fits into the free tokens; its sum is at least ``wanted``.
        wanted: Cost that is still to come.
        dp_size: Bins of a slot.
    """
    ceilings = np.repeat(load.reshape(-1, dp_size).max(axis=1), dp_size)
    low, high = 0.0, float((load + spare).max())
    for _ in range(30):  # to a billionth of the highest
        level = (low + high) / 2
        if np.minimum(np.maximum(ceilings, level) - load, spare).sum() < wanted:
            low = level
        else:
            high = level
    return np.maximum(ceilings, high)


def _deal(bins: list[list[int]], costs: Sequence[float], dp_size: int) -> list[_Slot]:
    """Slots of bins of like cost, the costliest first and empty ones last."""
    weighed = [(math.fsum(costs[i] for i in members), members) for members in bins]
    weighed.sort(key=lambda item: (not item[1], -item[0]))
    return [weighed[start : start + dp_size] for start in range(0, len(weighed), dp_size)]


def _even_out(slot: _Slot, lengths: Sequence[int], costs: Sequence[float], max_tokens: int) -> _Slot:
    """Swap samples of the costliest microbatch for cheaper ones, or for nothing, while that evens the slot out."""
    even = (1 + _EVEN) * math.fsum(load for load, _ in slot) / len(slot)
    if slot[0][0] <= even:
        return slot
    ranks, samples = range(len(slot)), [i for _, members in slot for i in members]
    count = len(samples)
    # Behind the samples a nothing for each rank: to swap with it is to move.
    home = np.array([rank for rank in ranks for _ in slot[rank][1]] + list(ranks))
    price = np.array([costs[i] for i in samples] + [0.0 for _ in ranks])
    tokens = np.array([lengths[i] for i in samples] + [0 for _ in ranks])
    for _ in range(8 * len(slot)):
        load, used = np.bincount(home, price), np.bincount(home, tokens)
        top = int(load.argmax())
        mine = np.flatnonzero(home[:count] == top)
        saved, longer = price[mine, None] - price, tokens[mine, None] - tokens
        after = np.maximum(load[top] - saved, load[home] + saved)
        after[(saved <= 0) | (longer < 0) | (used[home] + longer > max_tokens)] = np.inf
        give, take = np.unravel_index(after.argmin(), after.shape)
        if load[top] <= even or after[give, take] > (1 - _EVEN / 10) * load[top]:
            break
        home[mine[give]], home[take] = home[take], top
    shares = [[samples[place] for place in np.flatnonzero(home[:count] == rank)] for rank in ranks]
    return _deal(shares, costs, len(slot))[0]


def _time(slots: list[_Slot]) -> float:
    """Lock-step time: the first of a slot is its costliest."""
    return math.fsum(slot[0][0] for slot in slots)
