"""Tokens per second of packed against padded training on long-tailed response lengths; prints the ratios.

PYTHONPATH=. .venv/bin/python benchmarks/packing.py [--samples 48] [--longest 1024] [--max-tokens 2048] [--rounds 5]

The real ``Policy.forward_backward`` of a small Qwen3-MoE on one CPU rank, the ways taking turns on the same samples:

- packed: the microbatches that ``plan_microbatches`` makes.
- padded: what a trainer without packing computes. As many samples a microbatch, in order of arrival, as fit the token
  limit when each takes as much as the longest, and each filled up to it on the left with prompt tokens.
- sorted: the same with the samples sorted by length first, as trainers do that pad and care.

Only real tokens are counted. Padding passes through every layer, but not through the output layer and the loss, which
see response tokens only: a trainer that pads usually pays for these too, so the ratios are on the careful side. Lengths
are those of ``benchmarks/planning.py`` for long chains of thought, scaled down to ``--longest``.
"""

from __future__ import annotations

import argparse
import os
import statistics
import tempfile
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from benchmarks.planning import MAX_TOKENS, long_reasoning
from megatron_vespo.batching import plan_microbatches
from megatron_vespo.types import Prompt, Sample
from tests.tiny_models import make_tiny_qwen3_moe

if TYPE_CHECKING:
    from megatron_vespo.policy.policy import Policy

VOCABULARY = 256
Work = tuple[list[Sample], list[list[int]]]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--samples", type=int, default=48)
    parser.add_argument("--longest", type=int, default=1024)
    parser.add_argument("--max-tokens", type=int, default=2048)
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    samples = make_samples(options.samples, options.longest)
    works: dict[str, Work] = {
        "packed": (samples, plan_microbatches(fed(samples), 1, options.max_tokens).ranks[0]),
        "padded": pad(samples, range(len(samples)), options.max_tokens),
        "sorted": pad(samples, np.argsort(fed(samples), kind="stable")[::-1].tolist(), options.max_tokens),
    }
    with tempfile.TemporaryDirectory() as folder:
        model = make_tiny_qwen3_moe(
            folder,
            vocab_size=VOCABULARY,
            hidden_size=64,
            num_layers=4,
            moe_intermediate_size=64,
            max_position_embeddings=options.longest,
            std=0.02,
        )
        times = measure(model, works, options.rounds)
    report(works, times, sum(fed(samples)))


def fed(samples: Sequence[Sample]) -> list[int]:
    """Tokens that each sample feeds to the model: its last is predicted, never fed."""
    return [sample.total_length - 1 for sample in samples]


def make_samples(number: int, longest: int) -> list[Sample]:
    """Samples with the lengths of long chains of thought, ``longest`` standing for the limit there."""
    rng = np.random.default_rng(0)
    samples = []
    for index, length in enumerate(long_reasoning(rng, number)):
        total = max(3, length * longest // MAX_TOKENS)
        prompt = min(max(1, 200 * longest // MAX_TOKENS), total - 2)
        ids = rng.integers(3, VOCABULARY, total).astype(np.int32)
        response = total - prompt
        log_mu = np.full(response, -np.log(VOCABULARY), np.float32)
        samples.append(
            Sample(
                Prompt(index, ids[:prompt]),
                0,
                ids[prompt:],
                log_mu,
                np.zeros(response, np.int32),
                "stop",
                advantage=1.0 if index % 2 else -1.0,
            )
        )
    return samples


def pad(samples: Sequence[Sample], order: Sequence[int], max_tokens: int) -> Work:
    """Group samples in an order and fill each up to the longest of its group."""
    groups: list[list[int]] = []
    lengths = fed(samples)
    for i in order:
        group = [*groups[-1], i] if groups else [i]
        if groups and len(group) * max(lengths[j] for j in group) <= max_tokens:
            groups[-1] = group
        else:
            groups.append([i])
    padded = list(samples)
    for group in groups:
        longest = max(lengths[i] for i in group)
        for i in group:
            ids = np.pad(samples[i].prompt.input_ids, (longest - lengths[i], 0), constant_values=1)
            padded[i] = replace(samples[i], prompt=replace(samples[i].prompt, input_ids=ids))
    return padded, groups


def measure(model: Path, works: dict[str, Work], rounds: int) -> dict[str, list[float]]:
    """Seconds of each update's forward and backward passes, after one of each to warm up."""
    os.environ |= {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}
    from megatron_vespo import parallel
    from tests.policies import make_policy

    parallel.initialize({}, seed=1)
    policy = make_policy(model, {})
    times: dict[str, list[float]] = {name: [] for name in works}
    for turn in range(-1, rounds):
        for name, (samples, plan) in works.items():
            seconds = update(policy, samples, plan)
            if turn >= 0:
                times[name].append(seconds)
    parallel.shutdown()
    return times


def update(policy: Policy, samples: Sequence[Sample], plan: Sequence[Sequence[int]]) -> float:
    """Seconds of one forward and backward pass over all samples; the weights stay."""
    from megatron_vespo.algorithms.loss import Aggregation
    from megatron_vespo.algorithms.methods import KERNELS
    from megatron_vespo.algorithms.vespo import VespoParams
    from megatron_vespo.algorithms.weights import Weighting
    from megatron_vespo.policy.objectives import PolicyGradient, denominators

    objective = PolicyGradient(
        Weighting(KERNELS["vespo"], VespoParams()), Aggregation("token-mean"), denominators(samples)
    )
    start = time.perf_counter()
    policy.forward_backward(samples, plan, objective)
    return time.perf_counter() - start


def report(works: dict[str, Work], times: dict[str, list[float]], tokens: int) -> None:
    print(f"{tokens} real tokens in {len(works['packed'][0])} samples, longest {max(fed(works['packed'][0]))}")
    for name, (samples, plan) in works.items():
        seconds = times[name]
        print(
            f"{name:7}{len(plan):4} microbatches {1 - tokens / sum(fed(samples)):6.1%} padding"
            f"  median {statistics.median(seconds):.3f} s  min {min(seconds):.3f} s"
            f"  {tokens / statistics.median(seconds):7.0f} tokens/s"
        )
    for name in ("padded", "sorted"):
        median = statistics.median(times[name]) / statistics.median(times["packed"])
        print(f"packed / {name} tokens/s: median {median:.2f}  min {min(times[name]) / min(times['packed']):.2f}")


if __name__ == "__main__":
    main()
