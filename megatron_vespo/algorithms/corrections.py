"""Factors of kappa for the mismatch between the engines, pi_old / mu, to be combined with any method.

Where pi_old is not known on its own they take pi / mu, which suits methods without a ratio of their own.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_vespo.algorithms.baselines import NonnegativeParams, bounded_exp
from megatron_vespo.algorithms.weights import Ratios, correction


def _log_ratio(ratios: Ratios) -> Tensor:
    return ratios.log_ratio if ratios.log_mismatch is None else ratios.log_mismatch


@dataclass(frozen=True, slots=True)
class CapParams(NonnegativeParams):
    """Largest ratio."""

    cap: float = 2.0


@correction("tis", CapParams)
def tis(ratios: Ratios, params: CapParams) -> Tensor:
    """Truncated importance sampling (Yao et al. 2025, fengyao.notion.site/off-policy-rl): min(ratio, cap), by token."""
    return bounded_exp(_log_ratio(ratios)).clamp(max=params.cap)


@dataclass(frozen=True, slots=True)
class IcepopParams(NonnegativeParams):
    """Range of ratios that are kept."""

    low: float = 0.5
    high: float = 5.0


@correction("icepop", IcepopParams)
def icepop(ratios: Ratios, params: IcepopParams) -> Tensor:
    """IcePop (Ring-1T, arXiv 2510.18855, eq. 4): the ratio of a token, or 0 where it lies outside [low, high]."""
    ratio = bounded_exp(_log_ratio(ratios))
    return ratio.masked_fill((ratio < params.low) | (ratio > params.high), 0)


@correction("mis", CapParams)
def mis(ratios: Ratios, params: CapParams) -> Tensor:
    """Masked importance sampling (Liu, Li et al. 2025, "When speed kills stability"): W of the response, 0 above cap.

    W is the product of the ratios over the whole response.
    """
    log_w = ratios.log_w if ratios.log_mismatch is None else ratios.log_w - ratios.sum_log_drift
    # Compared in logs, so that a cap of any size is compared with the true W.
    limit = math.log(params.cap) if params.cap > 0 else -math.inf
    return ratios.spread(torch.where(log_w > limit, torch.zeros_like(log_w), bounded_exp(log_w)))
