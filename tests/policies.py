"""Policies of tiny models and samples for them, for the tests that train."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from megatron_vespo import parallel
from megatron_vespo.batching import plan_microbatches
from megatron_vespo.models.build import build_model, ddp_config, optimizer_config, transformer_config
from megatron_vespo.models.conversion import load_hf_weights
from megatron_vespo.models.hf_files import HfReader
from megatron_vespo.models.precision import packed_alignment
from megatron_vespo.models.registry import load_architecture
from megatron_vespo.policy.packing import packed_length
from megatron_vespo.policy.policy import Policy
from megatron_vespo.types import FloatArray, Prompt, Sample
from tests.ranks import run_ranks

# Large eps: Adam's step is then a smooth function of the gradient, so that rounding stays small.
OPTIMIZER = {"lr": 3e-3, "adam_eps": 1e-2, "clip_grad": 0.2, "weight_decay": 0.1}


def load_model(folder: Path, megatron: dict[str, Any], layer_spec: str = "local") -> list[Any]:
    """This rank's chunks of the model, weights loaded; the vocabulary padded to a multiple of 16."""
    architecture = load_architecture(folder)
    config = transformer_config(architecture, megatron, layer_spec)
    chunks = build_model(architecture, config, layer_spec=layer_spec, make_vocab_size_divisible_by=16)
    load_hf_weights(chunks, architecture, HfReader(folder))
    return chunks


def make_policy(
    folder: Path,
    megatron: dict[str, Any],
    temperature: float = 1.0,
    layer_spec: str = "local",
    warmup_steps: int = 0,
    decay_style: str = "constant",
) -> Policy:
    """A policy with these weights on this rank."""
    megatron = OPTIMIZER | megatron
    chunks = load_model(folder, megatron, layer_spec)
    return Policy(
        chunks,
        ddp_config=ddp_config(megatron),
        optimizer_config=optimizer_config(megatron),
        total_steps=10,
        warmup_steps=warmup_steps,
        decay_style=decay_style,
        vocab_size=load_architecture(folder).vocab_size,
        temperature=temperature,
        alignment=packed_alignment(chunks[0].config),
    )


def make_plan(samples: Sequence[Sample], max_tokens: int, empty: bool = False, multiple_of: int = 1) -> list[list[int]]:
    """This rank's microbatches; ``empty`` puts one without samples among them, at another place on each rank."""
    rank = parallel.data_parallel_rank()
    lengths = [packed_length(sample) for sample in samples]
    size = parallel.data_parallel_size()
    plan = plan_microbatches(lengths, size, max_tokens, multiple_of=multiple_of).ranks[rank]
    if empty:
        plan.insert(rank, [])
        plan += [[]] * (-len(plan) % multiple_of)
    return plan


def random_samples(number: int, vocabulary: int, seed: int = 0) -> list[Sample]:
    """Samples of many lengths, among them an empty response, a one-token prompt and an advantage of 0."""
    rng = np.random.default_rng(seed)
    samples = []
    for index in range(number):
        prompt = rng.integers(0, vocabulary, 1 if index < 2 else int(rng.integers(1, 6))).astype(np.int32)
        length = 0 if index in (1, 5) else int(rng.integers(1, 9))
        samples.append(
            Sample(
                Prompt(index, prompt),
                0,
                rng.integers(0, vocabulary, length).astype(np.int32),
                np.zeros(length, np.float32),
                np.zeros(length, np.int32),
                "stop",
                advantage=0.0 if index == 3 else float(rng.normal()),
            )
        )
    return samples


def _log_probs(folder: Path, samples: Sequence[Sample]) -> list[FloatArray]:
    return make_policy(folder, {}).log_probs(samples, [list(range(len(samples)))])


def off_policy_samples(folder: Path, number: int, noise: float = 0.1) -> list[Sample]:
    """Random samples whose log mu is near the model's log pi, so that W is near 1 and phi matters."""
    samples = random_samples(number, load_architecture(folder).vocab_size)
    (log_pi,) = run_ranks(1, _log_probs, folder, samples)
    rng = np.random.default_rng(1)
    return [
        replace(sample, log_mu=(values + rng.normal(0, noise, len(values))).astype(np.float32))
        for sample, values in zip(samples, log_pi, strict=True)
    ]
