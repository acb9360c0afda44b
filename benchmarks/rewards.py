"""Samples per second of the reward pool, beside calling the reward function directly.

PYTHONPATH=. .venv/bin/python benchmarks/rewards.py [--workers 2] [--repeats 5]

The ways take turns; shown is the median of the repeats. A sample has a prompt of 200 tokens, a response of 500 and its
text. "ratio" is the pool's rate over the direct one's in the same process, which scores one sample at a time. The last
line replaces workers: the time from a sample that crashes its process to the next one scored.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import statistics
import time
from collections.abc import Callable, Sequence

import numpy as np

from megatron_vespo.rewards.failures import RewardFailure
from megatron_vespo.rewards.pool import RewardPool
from megatron_vespo.types import Prompt, Sample


def trivial(sample: Sample) -> float:
    return float(sample.text.endswith(sample.prompt.label))


def one_millisecond(sample: Sample) -> float:
    """Works, rather than sleeps, for a millisecond."""
    end = time.perf_counter() + 1e-3
    while time.perf_counter() < end:
        pass
    return 1.0


async def judge(sample: Sample) -> float:
    """Waits as for a remote judge that takes 100 ms."""
    await asyncio.sleep(0.1)
    return 1.0


def crash(sample: Sample) -> float:
    if sample.text == "crash":
        os._exit(1)
    return 1.0


def make_samples(count: int) -> list[Sample]:
    rng = np.random.default_rng(0)
    samples = []
    for index in range(count):
        prompt = Prompt(index, rng.integers(0, 1000, 200, np.int32), "42", {"data_source": "benchmark"})
        ids = rng.integers(0, 1000, 500, np.int32)
        text = " ".join(map(str, ids.tolist()))
        samples.append(Sample(prompt, 0, ids, ids.astype(np.float32), ids, "stop", text))
    return samples


def seconds(work: Callable[[], object]) -> float:
    begin = time.perf_counter()
    work()
    return time.perf_counter() - begin


def start(function: str, workers: int) -> RewardPool:
    pool = RewardPool(f"benchmarks.rewards:{function}", workers=workers, timeout=60.0)
    pool.start()
    return pool


def score(pool: RewardPool, samples: Sequence[Sample]) -> list[float | BaseException]:
    async def all_of_them() -> list[float | BaseException]:
        return await asyncio.gather(*map(pool.score, samples), return_exceptions=True)

    return asyncio.run(all_of_them())


def rates(function: Callable[[Sample], float], samples: Sequence[Sample], workers: int, repeats: int) -> list[float]:
    """Samples per second: direct, pool."""
    pool = start(function.__name__, workers)
    ways: list[Callable[[], object]] = [lambda: [function(sample) for sample in samples], lambda: score(pool, samples)]
    times = [[seconds(way) for way in ways] for _ in range(repeats)]
    pool.close()
    return [len(samples) / statistics.median(column) for column in zip(*times, strict=True)]


def replacement_seconds(repeats: int) -> float:
    pool = start("crash", 1)
    good, bad = make_samples(2)
    bad.text = "crash"
    times = []
    for _ in range(repeats):
        times.append(seconds(lambda: score(pool, [bad, good])))
        assert isinstance(score(pool, [bad])[0], RewardFailure)
        assert score(pool, [good]) == [1.0]
    pool.close()
    return statistics.median(times)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=5)
    options = parser.parse_args()
    print(f"{'function':16}  {'direct/s':>10}  {'pool/s':>8}  {'ratio':>6}   ({options.workers} workers)")
    for function, count in ((trivial, 4000), (one_millisecond, 2000)):
        direct, pool_rate = rates(function, make_samples(count), options.workers, options.repeats)
        print(f"{function.__name__:16}  {direct:10,.0f}  {pool_rate:8,.0f}  {pool_rate / direct:6.3f}", flush=True)
    pool = start("judge", options.workers)
    samples = make_samples(4000)
    taken = statistics.median(seconds(lambda: score(pool, samples)) for _ in range(options.repeats))
    pool.close()
    print(f"{'judge (100 ms)':16}  {10:10,.0f}  {len(samples) / taken:8,.0f}  {len(samples) / taken / 10:6.1f}")
    print(f"start of a pool: {1e3 * seconds(lambda: start('trivial', options.workers).close()):.0f} ms")
    print(f"a crash and the next sample: {1e3 * replacement_seconds(options.repeats):.0f} ms")


if __name__ == "__main__":
    main()
