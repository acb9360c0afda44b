"""How much of a policy gradient would be heard, from the mismatch of single tokens.

With d the mean of log mu - log pi of a token and v the variance, log W of a response of L tokens is about normal,

    log W ~ Normal(-d L, v L) ,

a sum of L nearly independent terms; where mu is a distribution and the terms are small, v is about 2 d, so that
E[W] = exp(-d L + v L / 2) is 1 as it must be. Then E[phi] and E[phi^2] are integrals over one variable, the effective
sample size of phi is E[phi]^2 / E[phi^2] and that of W is exp(-v L).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch

from megatron_vespo.algorithms.health import k3
from megatron_vespo.algorithms.tokens import Doubles
from megatron_vespo.algorithms.weights import Ratios

# The integrals' grid, in standard deviations. Beyond 9 of them there is 1e-18; at 4,001 points an E[phi] is exact to
# 1e-4 as long as the standard deviation of log W is below 100.
_REACH, _POINTS = 9.0, 4001
# How many standard errors k1 must be away from k3 to be believed instead.
_SIGMAS = 3.0


@dataclass(frozen=True, slots=True)
class TokenDrift:
    """What one token adds to log W.

    Attributes:
        tokens: Tokens measured.
        k1: Mean of log mu - log pi (nats).
        k3: The same by the estimator that needs mu to be a distribution (nats).
        drift: The one of the two that is used: k3, whose variance is smaller, unless k1 contradicts it by more than
            three standard errors, as it does after top-p.
        variance: Of log pi - log mu (nats^2).
    """

    tokens: int
    k1: float
    k3: float
    drift: float
    variance: float


def measure_drift(log_ratio: Doubles) -> TokenDrift:
    """From log pi - log mu of tokens (nats), [T], T >= 1, all finite."""
    divergence = k3(log_ratio)
    first, third = float(-log_ratio.mean()), float(divergence.mean())
    error = float((-log_ratio - divergence).std() / math.sqrt(len(log_ratio)))
    drift = first if abs(first - third) > _SIGMAS * error + 1e-9 else third
    return TokenDrift(len(log_ratio), first, third, drift, float(log_ratio.var()))


@dataclass(frozen=True, slots=True)
class Heard:
    """How much is heard of responses of one length.

    Attributes:
        length: Tokens of a response.
        log_w_mean: Mean of log W (nats).
        log_w_sd: Its standard deviation (nats).
        ess_w: Effective sample size of W, a share.
        weight_pos: Mean |kappa| where the advantage is positive (E[phi], for VESPO); None: the kernel has one weight
            for every log W, which says nothing.
        weight_neg: The same where it is negative.
        ess_weight_pos: Effective sample size of kappa where the advantage is positive, a share.
        ess_weight_neg: The same where it is negative.
    """

    length: float
    log_w_mean: float
    log_w_sd: float
    ess_w: float
    weight_pos: float | None
    weight_neg: float | None
    ess_weight_pos: float | None
    ess_weight_neg: float | None

    @property
    def weight(self) -> float | None:
        """Mean |kappa| over both signs."""
        if self.weight_pos is None or self.weight_neg is None:
            return None
        return (self.weight_pos + self.weight_neg) / 2


Kappa = Callable[[Ratios], torch.Tensor]
"""A weight kernel with its parameters."""


def forecast(drift: TokenDrift, log_ratio: Doubles, length: float, kappa: Kappa) -> Heard:
    """What is heard of responses of ``length`` tokens.

    Args:
        drift: Of the tokens.
        log_ratio: Their log pi - log mu (nats), [T]: token-level kernels look at it.
        length: Tokens of a response.
        kappa: The weight.
    """
    mean, sd = -drift.drift * length, math.sqrt(drift.variance * length)
    z = np.linspace(-_REACH, _REACH, _POINTS)
    share = np.exp(-(z**2) / 2)
    share /= share.sum()
    log_w = mean + sd * z
    # Any order but the grid's own: a token's ratio says next to nothing of its response's.
    ratios = np.resize(np.random.default_rng(0).permutation(log_ratio), len(z))
    weights = {sign: _weights(kappa, log_w, ratios, np.full_like(log_w, length), sign) for sign in (1.0, -1.0)}
    informative = any(float(np.ptp(values)) > 0 for values in weights.values()) or sd == 0
    pos, ess_pos = _moments(share, weights[1.0]) if informative else (None, None)
    neg, ess_neg = _moments(share, weights[-1.0]) if informative else (None, None)
    return Heard(length, mean, sd, math.exp(-(sd**2)), pos, neg, ess_pos, ess_neg)


def observed_weight(log_w: Doubles, lengths: Doubles, log_ratio: Doubles, kappa: Kappa) -> float | None:
    """Mean |kappa| of responses as they were measured, over both signs of the advantage; None as in ``Heard``.

    Args:
        log_w: log W of the responses (nats), [S].
        lengths: Their tokens, [S].
        log_ratio: log pi - log mu of tokens (nats), [T].
        kappa: The weight.
    """
    ratios = np.resize(log_ratio, len(log_w))
    values = np.concatenate([_weights(kappa, log_w, ratios, lengths, sign) for sign in (1.0, -1.0)])
    return float(values.mean()) if float(np.ptp(values)) > 0 else None


def _weights(kappa: Kappa, log_w: Doubles, log_ratio: Doubles, lengths: Doubles, sign: float) -> Doubles:
    """|kappa| of one token of each of S responses, [S]."""
    sequences, tokens = torch.from_numpy(log_w), torch.from_numpy(log_ratio)
    ratios = Ratios(
        log_ratio=tokens,
        log_drift=tokens,
        log_mismatch=None,
        sample_index=torch.arange(len(log_w)),
        log_w=sequences,
        sum_log_drift=sequences,
        n_tokens=torch.from_numpy(lengths),
        advantages=torch.full_like(sequences, sign),
    )
    return kappa(ratios).abs().numpy()


def _moments(share: Doubles, weights: Doubles) -> tuple[float, float]:
    """Mean, and effective sample size."""
    mean, square = float(share @ weights), float(share @ weights**2)
    return mean, mean * mean / square if square > 0 else 0.0
