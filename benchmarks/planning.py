"""Compare microbatch planners on lock-step efficiency, microbatches and CPU time; prints one table.

PYTHONPATH=. .venv/bin/python benchmarks/planning.py [--seeds 5]

Expert-parallel ranks wait for each other in every microbatch, so a plan's efficiency is sum(cost) / (ranks * sum over k
of the largest cost of any rank's k-th microbatch). ``+`` charges every microbatch the time of OVERHEAD tokens besides:
it keeps a planner from winning with many tiny microbatches. ``!`` marks plans with a microbatch over the token limit.

The other planners are our reading of the published ideas, written anew, each with the choice that suits it best:

- verl: Karmarkar-Karp over the ranks by workload (24576 n + n^2) with equal counts, as many microbatches as the fullest
  rank's tokens need, Karmarkar-Karp again within each rank, costliest microbatch first. The limit is not enforced.
- slime: Karmarkar-Karp over the ranks by tokens with equal counts, as many microbatches as first fit needs on the worst
  rank, Karmarkar-Karp by tokens within each rank. The limit is not enforced.
- NeMo-RL: modified first fit decreasing over all samples, bins dealt to the ranks in turn.
- AReaL: samples dealt to the ranks by tokens, balanced; in each rank the longest samples open as many groups as the
  worst rank needs, every further one joins the group with the fewest samples that has room.
"""

from __future__ import annotations

import argparse
import heapq
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import astuple, dataclass

import numpy as np

from megatron_vespo.batching import plan_microbatches

MAX_TOKENS = 16_384
OVERHEAD = 256
# Rank -> microbatch -> samples.
Plan = list[list[list[int]]]
Planner = Callable[[Sequence[int], int, int], Plan]
Mix = Callable[[np.random.Generator, int], list[int]]


def cost(length: int) -> float:
    """FLOPs of a sample for Qwen3-30B-A3B, see models/cost.py."""
    return 6.083e9 * length + 393_216.0 * length * length


# --- Length distributions


def _clipped(prompts: np.ndarray, responses: np.ndarray) -> list[int]:
    return [int(n) for n in np.minimum(prompts + np.maximum(responses, 1), MAX_TOKENS)]


def _prompts(rng: np.random.Generator, n: int) -> np.ndarray:
    return np.clip(rng.lognormal(np.log(200), 0.4, n), 40, 1024)


def long_reasoning(rng: np.random.Generator, n: int) -> list[int]:
    """Chain of thought: median 3,000 tokens, one in twenty at the limit."""
    return _clipped(_prompts(rng, n), rng.lognormal(np.log(3000), 1.0, n))


def bimodal(rng: np.random.Generator, n: int) -> list[int]:
    """Two thirds answer in about 800 tokens, one third thinks for about 9,000."""
    thinks = rng.random(n) < 1 / 3
    return _clipped(_prompts(rng, n), np.where(thinks, rng.normal(9000, 2500, n), rng.lognormal(np.log(800), 0.5, n)))


def truncated(rng: np.random.Generator, n: int) -> list[int]:
    """Early in training: six in ten run into the limit, the others stop anywhere before."""
    return _clipped(_prompts(rng, n), np.where(rng.random(n) < 0.6, MAX_TOKENS, rng.uniform(500, MAX_TOKENS, n)))


def short_maths(rng: np.random.Generator, n: int) -> list[int]:
    """School mathematics: median 300 tokens, hardly a tail."""
    return _clipped(_prompts(rng, n), rng.lognormal(np.log(300), 0.6, n))


MIXES: tuple[Mix, ...] = (long_reasoning, bimodal, truncated, short_maths)
# Samples and data-parallel ranks.
SIZES = ((256, 8), (256, 32), (2048, 8), (512, 16))


# --- What the other planners do


def karmarkar_karp(weights: Sequence[float], groups: int, equal: bool = False) -> list[list[int]]:
    """Largest differencing method: heaviest group first; ``equal``: groups of equal counts."""
    order = sorted(range(len(weights)), key=lambda i: (-weights[i], i))
    size = groups if equal and len(order) % groups == 0 else 1
    heap: list[tuple[float, int, list[tuple[float, list[int]]]]] = []
    for serial, start in enumerate(range(0, len(order), size)):
        sets = [(weights[i], [i]) for i in order[start : start + size]]
        sets += [(0.0, []) for _ in range(groups - size)]
        heap.append((sets[-1][0] - sets[0][0], serial, sets))
    heapq.heapify(heap)
    serial = len(heap)
    while len(heap) > 1:
        first, second = heapq.heappop(heap)[2], heapq.heappop(heap)[2]
        sets = [(a + b, x + y) for (a, x), (b, y) in zip(first, reversed(second), strict=True)]
        sets.sort(key=lambda item: -item[0])
        heapq.heappush(heap, (sets[-1][0] - sets[0][0], serial, sets))
        serial += 1
    return [members for _, members in heap[0][2]]


def first_fit(lengths: Sequence[int], max_tokens: int) -> list[list[int]]:
    """Each sample into the first bin with room, in the order given."""
    free = np.zeros(0, dtype=np.int64)
    bins: list[list[int]] = []
    for i, length in enumerate(lengths):
        fitting = np.flatnonzero(free >= length)
        if len(fitting):
            free[fitting[0]] -= length
            bins[fitting[0]].append(i)
        else:
            free = np.append(free, max_tokens - length)
            bins.append([i])
    return bins


def _within(rank: Sequence[int], groups: Sequence[Sequence[int]]) -> list[list[int]]:
    return [[rank[i] for i in group] for group in groups]


def verl(lengths: Sequence[int], dp_size: int, max_tokens: int) -> Plan:
    work = [24576.0 * n + n * n for n in lengths]
    ranks = karmarkar_karp(work, dp_size, equal=True)
    k = max(-(-sum(lengths[i] for i in rank) // max_tokens) for rank in ranks)
    return [_within(rank, karmarkar_karp([work[i] for i in rank], k)) for rank in ranks]


def slime(lengths: Sequence[int], dp_size: int, max_tokens: int) -> Plan:
    ranks = [sorted(rank) for rank in karmarkar_karp(lengths, dp_size, equal=True)]
    k = max(len(first_fit([lengths[i] for i in rank], max_tokens)) for rank in ranks)
    return [_within(rank, karmarkar_karp([lengths[i] for i in rank], k)) for rank in ranks]


def _first_fit_decreasing(order: list[int], lengths: Sequence[int], bins: list[list[int]], free: list[int]) -> None:
    for i in order:
        for b, room in enumerate(free):
            if lengths[i] <= room:
                bins[b].append(i)
                free[b] -= lengths[i]
                break


def nemo_rl(lengths: Sequence[int], dp_size: int, max_tokens: int) -> Plan:
    order = sorted(range(len(lengths)), key=lambda i: (-lengths[i], i))
    bins = [[i] for i in order if 2 * lengths[i] > max_tokens]
    rest = order[len(bins) :]
    room = [max_tokens - lengths[members[0]] for members in bins]
    # Bins of the largest, fullest first, take the largest of middle size (over a third) that fits.
    for b in range(len(bins)):
        for i in rest:
            if 3 * lengths[i] > max_tokens and lengths[i] <= room[b]:
                bins[b].append(i)
                rest.remove(i)
                room[b] -= lengths[i]
                break
    # Those without one, emptiest first, take a pair of small ones: the smallest and the largest that fits with it.
    for b in reversed(range(len(bins))):
        small = [i for i in rest if 6 * lengths[i] > max_tokens >= 3 * lengths[i]]
        if len(bins[b]) == 1 and len(small) > 1 and lengths[small[-1]] + lengths[small[-2]] <= room[b]:
            partner = next(i for i in small[:-1] if lengths[i] + lengths[small[-1]] <= room[b])
            for i in (small[-1], partner):
                bins[b].append(i)
                rest.remove(i)
                room[b] -= lengths[i]
    # First fit decreasing for all that is left.
    for i in rest:
        b = next((b for b, free in enumerate(room) if lengths[i] <= free), len(bins))
        if b == len(bins):
            bins.append([])
            room.append(max_tokens)
        bins[b].append(i)
        room[b] -= lengths[i]
    # The bin with the most samples is halved until the ranks get equally many bins.
    while len(bins) % dp_size:
        fullest = max(range(len(bins)), key=lambda b: len(bins[b]))
        members = bins[fullest]
        bins[fullest] = members[::2]
        bins.append(members[1::2])
    return [bins[rank::dp_size] for rank in range(dp_size)]


def _fewest_samples(lengths: Sequence[int], rank: Sequence[int], min_groups: int, max_tokens: int) -> list[list[int]]:
    groups: list[list[int]] = []
    tokens: list[int] = []
    for i in sorted(rank, key=lambda i: (-lengths[i], i)):
        fitting = [g for g in range(len(groups)) if tokens[g] + lengths[i] <= max_tokens]
        if len(groups) < min_groups or not fitting:
            groups.append([i])
            tokens.append(lengths[i])
        else:
            g = min(fitting, key=lambda g: (len(groups[g]), tokens[g]))
            groups[g].append(i)
            tokens[g] += lengths[i]
    return groups


def areal(lengths: Sequence[int], dp_size: int, max_tokens: int) -> Plan:
    ranks: list[list[int]] = [[] for _ in range(dp_size)]
    heap = [(0, rank) for rank in range(dp_size)]
    for i in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        tokens, rank = heapq.heappop(heap)
        ranks[rank].append(i)
        heapq.heappush(heap, (tokens + lengths[i], rank))
    k, groups = 0, [_fewest_samples(lengths, rank, 1, max_tokens) for rank in ranks]
    while k != max(len(rank) for rank in groups):
        k = max(len(rank) for rank in groups)
        groups = [_fewest_samples(lengths, rank, k, max_tokens) for rank in ranks]
    return [rank + [[] for _ in range(k - len(rank))] for rank in groups]


def ours(lengths: Sequence[int], dp_size: int, max_tokens: int) -> Plan:
    return plan_microbatches(lengths, dp_size, max_tokens, cost, overhead_tokens=OVERHEAD).ranks


BASELINES: dict[str, Planner] = {"slime": slime, "verl": verl, "NeMo-RL": nemo_rl, "AReaL": areal}


# --- The comparison


@dataclass(frozen=True)
class Score:
    """A plan, or the mean of several.

    Attributes:
        efficiency: Lock-step efficiency.
        charged: The same with the overhead of every microbatch.
        microbatches: K.
        over: Microbatches over the token limit.
        ms: CPU time of planning.
    """

    efficiency: float
    charged: float
    microbatches: float
    over: float
    ms: float


def score(planner: Planner, lengths: Sequence[int], dp_size: int) -> Score:
    """Plan once and judge the plan by the definition, not by what the planner says."""
    start = time.process_time()
    plan = planner(lengths, dp_size, MAX_TOKENS)
    ms = 1e3 * (time.process_time() - start)
    assert sorted(i for rank in plan for members in rank for i in members) == list(range(len(lengths)))
    slots = list(zip(*plan, strict=True))
    slowest = sum(max(sum(cost(lengths[i]) for i in members) for members in slot) for slot in slots)
    ideal = sum(cost(n) for n in lengths) / dp_size
    over = sum(sum(lengths[i] for i in members) > MAX_TOKENS for slot in slots for members in slot)
    return Score(ideal / slowest, ideal / (slowest + len(slots) * cost(OVERHEAD)), len(slots), over, ms)


def mean_score(planner: Planner, mix: Mix, samples: int, dp_size: int, seeds: int) -> Score:
    """Mean over the seeds 0, 1, ..."""
    scores = [score(planner, mix(np.random.default_rng(seed), samples), dp_size) for seed in range(seeds)]
    return Score(*(statistics.mean(column) for column in zip(*map(astuple, scores), strict=True)))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, default=5)
    seeds = parser.parse_args().seeds
    planners = {**BASELINES, "ours": ours}
    print("efficiency/with overhead, K, planning ms (CPU); ! over the token limit")
    print(f"{'mix':15}{'samples':>8}{'ranks':>6}" + "".join(f" | {name:>25}" for name in planners))
    behind = []
    for mix in MIXES:
        for samples, dp_size in SIZES:
            row = {name: mean_score(planner, mix, samples, dp_size, seeds) for name, planner in planners.items()}
            cells = (
                f" | {s.efficiency:.3f}/{s.charged:.3f} {s.microbatches:5.1f}{'!' if s.over else ' '}{s.ms:6.1f}"
                for s in row.values()
            )
            print(f"{mix.__name__:15}{samples:8}{dp_size:6}" + "".join(cells))
            rest = [row[name] for name in BASELINES]
            if row["ours"].efficiency < max(s.efficiency for s in rest):
                behind.append(f"{mix.__name__} {samples}/{dp_size}")
            if row["ours"].charged < max(s.charged for s in rest):
                behind.append(f"{mix.__name__} {samples}/{dp_size} with overhead")
    print("ours is behind in:", ", ".join(behind) or "no cell")


if __name__ == "__main__":
    main()
