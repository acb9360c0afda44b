"""From samples and tables of figures to the values of metrics. Pure functions."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch

from megatron_vespo.algorithms.importance import summarize_staleness, summarize_weights
from megatron_vespo.metrics.registry import weight_metrics
from megatron_vespo.types import FINISH_LENGTH, GENERATE_FAILED, Sample, SampleGroup

Values = dict[str, float | None]
Table = Mapping[str, np.ndarray]


def rollout_metrics(groups: Sequence[SampleGroup]) -> Values:
    """The ``rollout/...`` metrics of a rollout batch. Samples that could not be scored have no part in the rewards'."""
    samples = [sample for group in groups for sample in group.samples]
    rewards = np.array([sample.reward for sample in samples if not sample.reward_error])
    lengths = np.array([len(sample.response_ids) for sample in samples])
    # A group of which none could be scored has no learning signal either.
    equal = [len({sample.reward for sample in group.samples if not sample.reward_error}) <= 1 for group in groups]
    return {
        "rollout/reward_mean": float(rewards.mean()) if len(rewards) else None,
        "rollout/reward_std": float(rewards.std()) if len(rewards) else None,
        "rollout/reward_failed_share": _failed_share(samples),
        "rollout/response_length_mean": float(lengths.mean()),
        "rollout/response_length_max": float(lengths.max()),
        "rollout/inserted_tokens_mean": float(np.mean([sample.inserted_length for sample in samples])),
        "rollout/generate_failed_share": float(np.mean([s.reward_error.startswith(GENERATE_FAILED) for s in samples])),
        "rollout/response_tokens": float(lengths.sum()),
        "rollout/truncated_share": float(np.mean([sample.finish_reason == FINISH_LENGTH for sample in samples])),
        "rollout/equal_reward_share": float(np.mean(equal)),
        **_reward_terms(samples),
        **_source_rewards(samples),
    }


def _reward_terms(samples: Sequence[Sample]) -> Values:
    """Means of the terms of which rewards are made, each over the samples that have it."""
    names = dict.fromkeys(name for sample in samples for name in sample.reward_terms)
    return {
        f"reward/{name}": float(np.mean([s.reward_terms[name] for s in samples if name in s.reward_terms]))
        for name in names
    }


def _source_rewards(samples: Sequence[Sample]) -> Values:
    """Mean reward by data source, where there are several; None for a source of which nothing could be scored."""
    rewards: dict[str, list[float]] = {}
    for sample in samples:
        rewards.setdefault(sample.prompt.data_source, []).extend([] if sample.reward_error else [sample.reward])
    rewards.pop("", None)  # batches that were saved without it
    if len(rewards) < 2:
        return {}
    return {f"reward/source/{name}": float(np.mean(found)) if found else None for name, found in rewards.items()}


def minibatch_metrics(samples: Sequence[Sample], table: Table, policy_version: int) -> Values:
    """Metrics of one minibatch of policy-gradient training.

    Args:
        samples: The minibatch.
        table: Figures of its samples from ``Policy.forward_backward``.
        policy_version: Version whose gradient was taken.
    """
    tokens = max(table["tokens"].sum(), 1.0)
    staleness = summarize_staleness([sample.staleness(policy_version) for sample in samples])
    weights = summarize_weights(
        torch.from_numpy(table["log_w"]),
        torch.from_numpy(table["phi"]),
        torch.tensor([sample.advantage for sample in samples]),
        torch.from_numpy(table["tokens"]),
    )
    return {
        "train/loss": float(table["loss"].sum()),
        "train/entropy": float(table["entropy"].sum() / tokens),
        "train/log_ratio_abs_mean": float(table["abs_log_ratio"].sum() / tokens),
        "train/log_ratio_abs_max": float(table["max_abs_log_ratio"].max()),
        "train/samples": len(samples),
        "train/tokens": sum(sample.total_length for sample in samples),
        "rollout/staleness_mean": staleness.mean,
        "rollout/staleness_max": staleness.max,
        **weight_metrics(weights),
        **_parts(samples, table),
    }


def _parts(samples: Sequence[Sample], table: Table) -> Values:
    """What makes log W: drift since the step began and mismatch of the engines; KL from the reference policy."""
    present = table["tokens"] > 0
    values: Values = {}
    if all(sample.log_old is not None for sample in samples):
        drift = table["log_drift"][present]
        mismatch = table["log_w"][present] - drift
        for name, part in (("drift", drift), ("mismatch", mismatch)):
            finite = part[np.isfinite(part)]
            values[f"vespo/log_w_{name}_mean"] = float(finite.mean()) if len(finite) else None
            values[f"vespo/log_w_{name}_abs_mean"] = float(np.abs(finite).mean()) if len(finite) else None
    if all(sample.log_ref is not None for sample in samples):
        values["train/kl_ref"] = float(table["kl_ref"].sum() / max(table["tokens"].sum(), 1.0))
    return values


def supervised_metrics(samples: Sequence[Sample], table: Table) -> Values:
    """Metrics of one minibatch of supervised training."""
    return {
        "train/loss": float(table["loss"].sum()),
        "train/accuracy": float(table["correct"].sum() / max(table["tokens"].sum(), 1.0)),
        "train/samples": len(samples),
        "train/tokens": sum(sample.total_length for sample in samples),
    }


def _failed_share(samples: Sequence[Sample]) -> float:
    return float(np.mean([bool(sample.reward_error) for sample in samples]))
