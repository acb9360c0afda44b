"""The math reward in the pool, with answers that make SymPy think for ever among them.

PYTHONPATH=. .venv/bin/python benchmarks/math_rewards.py [--samples 1000] [--hanging 0.05] [--workers 2] [--seconds 2]

Hanging answers are of two kinds. An alarm stops SymPy after --seconds; where it does not, the pool
kills their worker after --timeout and starts another. Every sample must come back: a right answer with 1, a wrong one
with 0, a hanging one as a failure. The last line is the rate.
"""

from __future__ import annotations

import argparse
import asyncio
import signal
import statistics
import time
from collections import Counter

import numpy as np

from megatron_vespo.rewards.failures import RewardFailure
from megatron_vespo.rewards.pool import RewardPool
from megatron_vespo.rewards.protocol import Term
from megatron_vespo.types import Prompt, Sample

# Label, right answer, wrong answer.
QUESTIONS = (
    ("42", r"\boxed{42}", r"\boxed{41}"),
    (r"\frac{1}{2}", r"\boxed{0.5}", r"\boxed{\frac{1}{3}}"),
    (r"\{1,2,3\}", r"\boxed{\{3, 2, 1\}}", r"\boxed{\{1, 2\}}"),
    ("[0,1)", r"\boxed{[0, 1)}", r"\boxed{(0, 1)}"),
    (r"\frac{\sqrt{3}}{3}", r"\boxed{\frac{1}{\sqrt{3}}}", r"\boxed{\sqrt{3}}"),
    ("x^2+2x+1", r"\boxed{(x+1)^2}", r"\boxed{(x-1)^2}"),
    ("1000", r"the final answer is $1{,}000$", r"\boxed{1{,}001}"),
    (r"\frac{\pi}{4}", r"\boxed{\arctan(1)}", r"\boxed{\frac{\pi}{3}}"),
)
# SymPy adds up a billion terms in Python, which a signal interrupts.
SLOW = r"\boxed{\sum_{k=1}^{10^{9}} \frac{\sin(k!)}{k}}"
# A hundred million digits: few, but long operations inside the interpreter.
HUGE = r"\boxed{3^{200000000}}"


def make(index: int, label: str, text: str) -> Sample:
    ids = np.array([1], np.int32)
    return Sample(Prompt(index, ids, label), 0, ids, np.zeros(1, np.float32), ids, "stop", text)


def make_samples(count: int, hanging: float) -> tuple[list[Sample], list[float | None]]:
    """Samples, and the rewards that are right; None: it hangs."""
    rng = np.random.default_rng(0)
    hang = set(rng.choice(count, round(count * hanging), replace=False).tolist())
    samples, rewards = [], []
    for index in range(count):
        label, right, wrong = QUESTIONS[rng.integers(len(QUESTIONS))]
        is_right = bool(rng.integers(2))
        bad = (SLOW, HUGE)[len([h for h in hang if h < index]) % 2]
        samples.append(make(index, label, bad if index in hang else f"Thus {right if is_right else wrong}."))
        rewards.append(None if index in hang else float(is_right))
    return samples, rewards


async def score(pool: RewardPool, samples: list[Sample]) -> list[tuple[float | BaseException, float]]:
    """What became of each, and the time.monotonic() of it."""

    async def one(sample: Sample) -> tuple[float | BaseException, float]:
        try:
            outcome: float | BaseException = await pool.score(sample)
        except RewardFailure as failure:
            outcome = failure
        return outcome, time.monotonic()

    return await asyncio.gather(*map(one, samples))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--samples", type=int, default=1000)
    parser.add_argument("--hanging", type=float, default=0.05)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--seconds", type=int, default=2)
    parser.add_argument("--timeout", type=float, default=5.0)
    options = parser.parse_args()
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    samples, rewards = make_samples(options.samples, options.hanging)
    term = Term("", "math", params={"seconds": options.seconds})
    pool = RewardPool([term], workers=options.workers, timeout=options.timeout)
    pool.start()
    begin = time.monotonic()
    outcomes = asyncio.run(score(pool, samples))
    taken = time.monotonic() - begin
    counts = pool.take_counts()
    pool.close()
    wrong = [
        (sample.text, reward, outcome)
        for sample, reward, (outcome, _) in zip(samples, rewards, outcomes, strict=True)
        if (isinstance(outcome, RewardFailure) if reward is None else outcome == reward) is False
    ]
    reasons = Counter(str(outcome)[:40] for outcome, _ in outcomes if isinstance(outcome, RewardFailure))
    print(f"{len(outcomes)} of {len(samples)} samples came back; {counts}")
    for reason, count in reasons.most_common():
        print(f"  {count} x {reason}...")
    print(f"unlike what they should be: {len(wrong)} {Counter(map(str, wrong)).most_common(3) if wrong else ''}")
    print(f"half of them within {statistics.median(end for _, end in outcomes) - begin:.1f} s")
    print(f"{taken:.1f} s, {len(samples) / taken:.1f} samples/s ({options.workers} workers)")


if __name__ == "__main__":
    main()
