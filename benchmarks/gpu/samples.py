"""Samples with the lengths of long chains of thought, for a training step."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from benchmarks.planning import MAX_TOKENS, long_reasoning
from megatron_vespo.types import Prompt, Sample


def make_samples(number: int, longest: int, vocabulary: int, seed: int = 0) -> list[Sample]:
    """Random tokens; of each sample a sixteenth is prompt, and half of the samples have a negative advantage.

    Args:
        number: Samples.
        longest: Tokens of the longest possible; lengths are those of ``benchmarks/planning.py``, scaled.
        vocabulary: Ids are below it.
        seed: Of lengths and tokens.
    """
    rng = np.random.default_rng(seed)
    samples = []
    for index, length in enumerate(long_reasoning(rng, number)):
        total = max(4, length * longest // MAX_TOKENS)
        prompt = max(1, total // 16)
        ids = rng.integers(0, vocabulary, total).astype(np.int32)
        response = total - prompt
        # What a model of random weights says of any token, so that W is near 1.
        log_mu = np.full(response, -np.log(vocabulary), np.float32)
        samples.append(
            Sample(
                *(Prompt(index, ids[:prompt]), 0, ids[prompt:], log_mu, np.zeros(response, np.int32), "stop"),
                advantage=1.0 if index % 2 else -1.0,
            )
        )
    return samples


def with_tokens(tokens: int, longest: int, vocabulary: int) -> list[Sample]:
    """As many samples as have at least so many tokens."""
    number = 1
    while sum(fed(samples := make_samples(number, longest, vocabulary))) < tokens:
        number += 1
    return samples


def fed(samples: Sequence[Sample]) -> list[int]:
    """Tokens that each sample feeds to the model: its last is predicted, never fed."""
    return [sample.total_length - 1 for sample in samples]
