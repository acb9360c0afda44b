"""Importance weights over packed tokens, and what they say about how off-policy a batch is.

A value that has nothing to be computed from (an empty selection) is ``None``; NaN is never used for that, so a NaN in a
metric always means that something went wrong.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

# A weight phi below this counts as "the sample is hardly heard".
SMALL_PHI = 0.1
# Temporaries of work over packed tokens are this long, so that they are small beside the tokens themselves.
TOKENS_PER_CHUNK = 8192


def token_chunks(num_tokens: int) -> Iterator[slice]:
    """Slices of at most ``TOKENS_PER_CHUNK`` tokens that cover ``num_tokens`` in order."""
    for start in range(0, num_tokens, TOKENS_PER_CHUNK):
        yield slice(start, min(start + TOKENS_PER_CHUNK, num_tokens))


def add_to_samples(totals: Tensor, sample_index: Tensor, values: Tensor) -> None:
    """Add each token's value to its sample: values [T], sample_index [T] in [0, S), totals [S] float64, in place.

    Float64, because over 10,000 tokens float32 would lose digits of log W, and on a GPU, whose additions come in any
    order, the result would change from run to run.
    """
    totals.index_add_(0, sample_index, values.double())


def segment_sum(values: Tensor, sample_index: Tensor, num_samples: int) -> Tensor:
    """Sum of each sample's tokens: values [T], sample_index [T] in [0, S) -> [S]; 0 for a sample without tokens.

    Adds up in float64, see ``add_to_samples``, in chunks of tokens, and returns ``values``' dtype. Not differentiable.
    """
    values = values.detach()
    totals = torch.zeros(num_samples, dtype=torch.float64, device=values.device)
    for chunk in token_chunks(values.numel()):
        add_to_samples(totals, sample_index[chunk], values[chunk])
    return totals.to(values.dtype)


def token_log_ratio(log_pi: Tensor, log_mu: Tensor) -> Tensor:
    """The log ratio of each token, log pi - log mu, shape [T]; -inf where pi is 0, whatever finite or 0 mu is."""
    return torch.where(log_pi.isneginf(), log_pi, log_pi - log_mu)


def is_nonfinite(log_pi: Tensor, log_mu: Tensor) -> Tensor:
    """Whether a token's log pi or log mu is NaN or +inf, which no probability has, shape [T]; -inf is legal."""
    return ~(torch.maximum(log_pi, log_mu) < torch.inf)


def sequence_log_ratio(total: Tensor, n_nonfinite: Tensor) -> Tensor:
    """The importance weight log W of each sample: the sum of its tokens' log ratios, not divided by its length.

    Args:
        total: Sum of ``token_log_ratio`` over each sample, shape [S]; 0 for an empty response.
        n_nonfinite: How many of the sample's tokens are ``is_nonfinite``, shape [S].

    Returns:
        Shape [S]; -inf where pi gives a token probability 0, +inf where only mu does, NaN exactly where
        ``n_nonfinite`` is positive: such a sample has no log W, neither a finite nor an infinite one.
    """
    # The sum is NaN where one token says -inf and another +inf. Then pi of the response is 0, and so is W.
    log_w = total.masked_fill(total.isnan(), -torch.inf)
    return log_w.masked_fill(n_nonfinite > 0, torch.nan)


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
        return summarize(log_w[selected], phi[selected])

    return WeightSummaries(of(present), of(present & (advantages > 0)), of(present & (advantages < 0)))


def summarize(log_w: Tensor, phi: Tensor) -> WeightSummary:
    """The summary of samples with these log W (nats) and weights, both [S]."""
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
        ess_phi=effective_sample_size(phi.abs().log()),
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
