"""Importance weights over packed tokens, and what they say about how off-policy a batch is.

A value that has nothing to be computed from (an empty selection) is ``None``; NaN is never used for that, so a NaN in a
metric always means that something went wrong.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

# A weight phi below this counts as "the sample is hardly heard".
SMALL_PHI = 0.1


def segment_sum(values: Tensor, sample_index: Tensor, num_samples: int) -> Tensor:
    """Sum of each sample's tokens: values [T], sample_index [T] in [0, S) -> [S]; 0 for a sample without tokens.

    Adds up in float64 and returns ``values``' dtype: over 10,000 tokens float32 would lose digits of log W, and on a
    GPU, whose additions come in any order, the result would change from run to run.
    """
    total = torch.zeros(num_samples, dtype=torch.float64, device=values.device)
    return total.index_add(0, sample_index, values.double()).to(values.dtype)


def segment_max(values: Tensor, sample_index: Tensor, num_samples: int) -> Tensor:
    """Largest of each sample's tokens, for values >= 0: [T] -> [S]; 0 for a sample without tokens."""
    return values.new_zeros(num_samples).scatter_reduce(0, sample_index, values, reduce="amax")


def token_log_ratio(log_pi: Tensor, log_mu: Tensor) -> Tensor:
    """The log ratio of each token, log pi - log mu, shape [T]; -inf where pi is 0, whatever mu is."""
    return torch.where(log_pi.isneginf(), log_pi, log_pi - log_mu)


def sequence_log_ratio(log_ratio: Tensor, sample_index: Tensor, num_samples: int) -> Tensor:
    """The importance weight log W of each sample: the sum of its tokens' log ratios, not divided by its length.

    Args:
        log_ratio: log pi - log mu of real response tokens (nats), shape [T]; infinities allowed, NaN not.
        sample_index: Sample of each token, in [0, S), shape [T].
        num_samples: S.

    Returns:
        Shape [S]; 0 for an empty response, -inf where pi gives a token probability 0, +inf where only mu does.
    """
    log_w = segment_sum(log_ratio, sample_index, num_samples)
    # The sum is NaN where one token says -inf and another +inf. Then pi of the response is 0, and so is W.
    return torch.where(log_w.isnan(), torch.full_like(log_w, -torch.inf), log_w)


def effective_sample_size(log_weights: Tensor) -> float | None:
    """(sum w)^2 / (n * sum w^2), from log w, shape [n]: 1 where all weights are equal, 1/n where one dominates.

    Kish's effective sample size divided by n. Only differences of log w enter, so any magnitude works. All weights 0
    (-inf) give 0; k infinite weights (+inf) give k/n, the limit; no weights at all give None.
    """
    n = log_weights.numel()
    if n == 0:
        return None
    values = log_weights.double()
    largest = values.max()
    if largest.isneginf():
        return 0.0
    # The largest weight is set to 1 by name, because inf - inf would be NaN.
    shifted = torch.where(values == largest, torch.zeros_like(values), values - largest)
    log_ess = 2 * torch.logsumexp(shifted, 0) - torch.logsumexp(2 * shifted, 0) - math.log(n)
    # Rounding can carry equal weights to 1 + 1e-16.
    return min(1.0, math.exp(log_ess.item()))


@dataclass(frozen=True, slots=True)
class WeightSummary:
    """How off-policy a set of samples is, and how much of it is heard. Every field is None for an empty set.

    Attributes:
        log_w_mean: Mean of log W (nats), over the samples where it is finite.
        log_w_abs_mean: Mean of |log W| (nats), over the samples where it is finite.
        log_w_abs_max: Largest |log W| (nats), infinity included.
        log_w_infinite_share: Share of samples whose log W is infinite.
        ess_w: Normalised effective sample size of W.
        ess_phi: Normalised effective sample size of phi.
        phi_mean: Mean of phi (or whatever the kernel's weight is called).
        phi_small_share: Share of samples with phi < 0.1.
    """

    log_w_mean: float | None = None
    log_w_abs_mean: float | None = None
    log_w_abs_max: float | None = None
    log_w_infinite_share: float | None = None
    ess_w: float | None = None
    ess_phi: float | None = None
    phi_mean: float | None = None
    phi_small_share: float | None = None


@dataclass(frozen=True, slots=True)
class WeightSummaries:
    """The summary of all samples, and of those with a positive and a negative advantage."""

    all: WeightSummary
    positive: WeightSummary
    negative: WeightSummary


def summarize_weights(log_w: Tensor, phi: Tensor, advantages: Tensor, n_tokens: Tensor) -> WeightSummaries:
    """Summaries by the advantage's sign. Empty responses count nowhere; zero advantages count only in ``all``.

    Args:
        log_w: log W of each sample (nats), shape [S].
        phi: Weight of each sample, its mean over tokens for a token-level kernel, shape [S].
        advantages: Shape [S].
        n_tokens: Response tokens of each sample, shape [S].
    """
    present = n_tokens > 0

    def of(selected: Tensor) -> WeightSummary:
        return _summarize(log_w[selected], phi[selected])

    return WeightSummaries(of(present), of(present & (advantages > 0)), of(present & (advantages < 0)))


def _summarize(log_w: Tensor, phi: Tensor) -> WeightSummary:
    if log_w.numel() == 0:
        return WeightSummary()
    log_w, phi = log_w.double(), phi.double()
    finite = log_w[~log_w.isinf()]
    return WeightSummary(
        log_w_mean=finite.mean().item() if finite.numel() else None,
        log_w_abs_mean=finite.abs().mean().item() if finite.numel() else None,
        log_w_abs_max=log_w.abs().max().item(),
        log_w_infinite_share=1 - finite.numel() / log_w.numel(),
        ess_w=effective_sample_size(log_w),
        ess_phi=effective_sample_size(phi.log()),
        phi_mean=phi.mean().item(),
        phi_small_share=(phi < SMALL_PHI).double().mean().item(),
    )


@dataclass(frozen=True, slots=True)
class StalenessSummary:
    """Staleness of a set of samples, in optimizer steps; None for an empty set."""

    mean: float | None
    max: int | None


def summarize_staleness(staleness: Sequence[int]) -> StalenessSummary:
    """Mean and maximum of the samples' staleness (``Sample.staleness``)."""
    if len(staleness) == 0:
        return StalenessSummary(None, None)
    return StalenessSummary(sum(staleness) / len(staleness), max(staleness))
