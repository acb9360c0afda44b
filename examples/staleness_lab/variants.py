"""Variants of VESPO on trial: kernels of one's own, named in a grid as ``examples/staleness_lab/variants.py:tempered``.

Each looks at the whole minibatch first (``WeightKernel.measure``), which costs a forward pass.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from megatron_vespo.algorithms.vespo import VespoParams, sample_phi
from megatron_vespo.algorithms.weights import Ratios, weight_kernel


def heard(ratios: Ratios) -> Tensor:
    """Samples that have something to say, [S] bool."""
    return (ratios.advantages != 0) & (ratios.n_tokens > 0) & ratios.log_w.isfinite()


@dataclass(frozen=True, slots=True)
class NormalizedParams(VespoParams):
    """Of ``normalized``.

    Attributes:
        min_mean: The mean of phi is not taken to be smaller than this.
    """

    min_mean: float = 0.01


def _mean_phi(ratios: Ratios, params: NormalizedParams) -> tuple[float, ...]:
    chosen = heard(ratios)
    values = sample_phi(ratios.log_w, ratios.log_w, ratios.advantages, params)[chosen]
    return (max(float(values.mean()), params.min_mean) if len(values) else 1.0,)


@weight_kernel("vespo-normalized", NormalizedParams, measure=_mean_phi)
def normalized(ratios: Ratios, params: NormalizedParams) -> Tensor:
    """phi(W) divided by its mean over the minibatch: the gradient keeps its size as fewer samples are heard."""
    (mean,) = ratios.statistics
    return ratios.spread(sample_phi(ratios.log_w, ratios.log_w, ratios.advantages, params) / mean)


def _center(ratios: Ratios, params: VespoParams) -> tuple[float, ...]:
    chosen = heard(ratios)
    return (float(ratios.log_w[chosen].median()) if chosen.any() else 0.0,)


@weight_kernel("vespo-centered", VespoParams, measure=_center)
def centered(ratios: Ratios, params: VespoParams) -> Tensor:
    """phi(W / median W): the typical sample of the minibatch is heard whole, whatever the drift."""
    (center,) = ratios.statistics
    return ratios.spread(sample_phi(ratios.log_w - center, ratios.log_w - center, ratios.advantages, params))


@dataclass(frozen=True, slots=True)
class TemperedParams(VespoParams):
    """Of ``tempered``.

    Attributes:
        min_phi: Mean phi of the minibatch that W is tempered to reach.
    """

    min_phi: float = 0.5


def tempering(log_w: Tensor, advantages: Tensor, params: TemperedParams) -> float:
    """The largest alpha in (0, 1] at which mean phi(W^alpha) is at least ``min_phi``; at 0 it is 1.

    By halving an interval twenty times: mean phi need not be monotonous, so this finds one such alpha.
    """

    def mean(alpha: float) -> float:
        return float(sample_phi(alpha * log_w, alpha * log_w, advantages, params).mean())

    if not len(log_w) or mean(1.0) >= params.min_phi:
        return 1.0
    low, high = 0.0, 1.0
    for _ in range(20):
        middle = (low + high) / 2
        low, high = (middle, high) if mean(middle) >= params.min_phi else (low, middle)
    return low


def _tempering(ratios: Ratios, params: TemperedParams) -> tuple[float, ...]:
    chosen = heard(ratios)
    return (tempering(ratios.log_w[chosen], ratios.advantages[chosen], params),)


@weight_kernel("vespo-tempered", TemperedParams, measure=_tempering)
def tempered(ratios: Ratios, params: TemperedParams) -> Tensor:
    """phi(W^alpha), alpha as near to 1 as lets mean phi be ``min_phi``: VESPO near the policy, softer far from it.

    alpha = 1 is VESPO, alpha = 0 REINFORCE, alpha = 1 / length the length normalisation of GSPO.
    """
    (alpha,) = ratios.statistics
    log_w = alpha * ratios.log_w
    return ratios.spread(sample_phi(log_w, log_w, ratios.advantages, params))
