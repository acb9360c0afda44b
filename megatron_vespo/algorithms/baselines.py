"""The methods that VESPO is compared with, each as its weight kappa on grad log pi.

r is the ratio of a token, pi / pi_old; W the product of the ratios to mu over the whole response. A loss that is
differentiated through its ratio has grad r = r * grad log pi, so r is part of kappa.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, fields

import torch
from torch import Tensor

from megatron_vespo.algorithms.aggregation import Aggregation
from megatron_vespo.algorithms.weights import MAX_LOG_RATIO, Ratios, weight_kernel
from megatron_vespo.errors import UserError


@dataclass(frozen=True, slots=True)
class NoParams:
    """A method without parameters."""


@dataclass(frozen=True, slots=True)
class NonnegativeParams:
    """Base of parameters that are numbers >= 0.

    Raises:
        UserError: One is negative or NaN; names it.
    """

    def __post_init__(self) -> None:
        for item in fields(self):
            value = getattr(self, item.name)
            if not value >= 0:
                raise UserError(f"{item.name} must be a number >= 0, got {value}")


def bounded_exp(log_ratio: Tensor) -> Tensor:
    """Exp of a log ratio, which is not let above ``MAX_LOG_RATIO``."""
    return log_ratio.clamp(max=MAX_LOG_RATIO).exp()


@weight_kernel("reinforce", NoParams, corrects=False)
def reinforce(ratios: Ratios, params: NoParams) -> Tensor:
    """REINFORCE (Williams 1992): kappa = 1, no correction for samples that are off-policy."""
    return torch.ones_like(ratios.log_ratio)


@weight_kernel("rloo", NoParams, corrects=False, advantage="leave_one_out", aggregation=Aggregation.SEQ_MEAN_TOKEN_SUM)
def rloo(ratios: Ratios, params: NoParams) -> Tensor:
    """RLOO (arXiv 2402.14740): REINFORCE, with the mean of the other samples' rewards as baseline."""
    return torch.ones_like(ratios.log_ratio)


@dataclass(frozen=True, slots=True)
class ClipParams(NonnegativeParams):
    """Parameters of the clipped objectives.

    Attributes:
        eps_low: A token of negative advantage has no gradient where its ratio is below 1 - eps_low.
        eps_high: A token of positive advantage has none where its ratio is above 1 + eps_high.
        dual_clip: A token of negative advantage has none where its ratio is above this (arXiv 1912.09729); inf: off.

    Raises:
        UserError: A value is negative, or dual_clip not above 1.
    """

    eps_low: float = 0.2
    eps_high: float = 0.2
    dual_clip: float = math.inf

    def __post_init__(self) -> None:
        NonnegativeParams.__post_init__(self)  # super() does not find the class that slots made anew
        if not self.dual_clip > 1:
            raise UserError(f"dual_clip must be above 1, or .inf for none, got {self.dual_clip}")


def clipped(log_ratio: Tensor, advantages: Tensor, params: ClipParams) -> Tensor:
    """Kappa of -min(r A, clip(r, 1 - eps_low, 1 + eps_high) A), and of max(that, dual_clip |A|): r, or 0 if clipped."""
    ratio = bounded_exp(log_ratio)
    positive = advantages >= 0
    too_high = torch.where(positive, ratio > 1 + params.eps_high, ratio > params.dual_clip)
    return ratio.masked_fill(too_high | (~positive & (ratio < 1 - params.eps_low)), 0)


@dataclass(frozen=True, slots=True)
class GrpoParams(ClipParams):
    """Clip range of GRPO, with the dual clip that verl and slime have."""

    dual_clip: float = 3.0


@weight_kernel("grpo", GrpoParams, aggregation=Aggregation.SEQ_MEAN_TOKEN_MEAN)
def grpo(ratios: Ratios, params: ClipParams) -> Tensor:
    """GRPO (arXiv 2402.03300, eq. 3): PPO's clipped ratio of each token."""
    return clipped(ratios.log_drift, ratios.token_advantages, params)


@dataclass(frozen=True, slots=True)
class DapoParams(ClipParams):
    """Clip range of DAPO."""

    eps_high: float = 0.28


@weight_kernel("dapo", DapoParams)
def dapo(ratios: Ratios, params: ClipParams) -> Tensor:
    """DAPO (arXiv 2503.14476, eq. 8): GRPO with a higher upper clip and every token counting the same."""
    return clipped(ratios.log_drift, ratios.token_advantages, params)


@weight_kernel("dr_grpo", ClipParams, normalize_std=False, aggregation=Aggregation.SEQ_MEAN_TOKEN_SUM_NORM)
def dr_grpo(ratios: Ratios, params: ClipParams) -> Tensor:
    """Dr. GRPO (arXiv 2503.20783): GRPO without the division by the group's deviation and by the response's length."""
    return clipped(ratios.log_drift, ratios.token_advantages, params)


@dataclass(frozen=True, slots=True)
class GspoParams(ClipParams):
    """Clip range of GSPO, whose ratio is a geometric mean over the response and so much nearer to 1."""

    eps_low: float = 3e-4
    eps_high: float = 4e-4


@weight_kernel("gspo", GspoParams, aggregation=Aggregation.SEQ_MEAN_TOKEN_MEAN)
def gspo(ratios: Ratios, params: ClipParams) -> Tensor:
    """GSPO (arXiv 2507.18071, eq. 5): the clipped ratio of the whole response, to the power 1 / length.

    Its gradient is s * A * (1 / length) * sum of grad log pi (eq. 10); the division is the aggregation's.
    """
    log_s = ratios.sum_log_drift / ratios.n_tokens.clamp(min=1)
    return ratios.spread(clipped(log_s, ratios.advantages, params))


@dataclass(frozen=True, slots=True)
class SapoParams(NonnegativeParams):
    """Steepness of the soft gate of SAPO, for positive and for negative advantages."""

    tau_pos: float = 1.0
    tau_neg: float = 1.05


@weight_kernel("sapo", SapoParams, aggregation=Aggregation.SEQ_MEAN_TOKEN_MEAN)
def sapo(ratios: Ratios, params: SapoParams) -> Tensor:
    """SAPO (arXiv 2511.20347): the ratio passes a sigmoid, f(r) = 4 / tau * sigmoid(tau (r - 1)), in place of a clip.

    So kappa = r * f'(r) = r * 4 p (1 - p) with p = sigmoid(tau (r - 1)), 1 at r = 1.
    """
    ratio = bounded_exp(ratios.log_drift)
    positive = ratios.token_advantages > 0
    gate = torch.where(positive, params.tau_pos * (ratio - 1), params.tau_neg * (ratio - 1)).sigmoid()
    return ratio * 4 * gate * (1 - gate)


@dataclass(frozen=True, slots=True)
class CispoParams(NonnegativeParams):
    """Range that CISPO's weight is clipped to, [1 - eps_low, 1 + eps_high]; no lower limit by default."""

    eps_low: float = 1.0
    eps_high: float = 4.0


@weight_kernel("cispo", CispoParams)
def cispo(ratios: Ratios, params: CispoParams) -> Tensor:
    """CISPO (MiniMax-M1, arXiv 2506.13585, eq. 4): the ratio itself is clipped and detached, no token is silenced."""
    return bounded_exp(ratios.log_drift).clamp(1 - params.eps_low, 1 + params.eps_high)


@dataclass(frozen=True, slots=True)
class ToprParams(NonnegativeParams):
    """Ranges that TOPR clips W to, by the sign of the advantage."""

    pos_low: float = 1.0
    pos_high: float = 1.0
    neg_low: float = 0.0
    neg_high: float = 1.0


@weight_kernel("topr", ToprParams, normalize_std=False, aggregation=Aggregation.SEQ_MEAN_TOKEN_SUM)
def topr(ratios: Ratios, params: ToprParams) -> Tensor:
    """TOPR (arXiv 2503.14286, eq. 8): good responses count whole, bad ones by W, at most 1."""
    w = bounded_exp(ratios.log_w)
    kappa = torch.where(
        ratios.advantages >= 0, w.clamp(params.pos_low, params.pos_high), w.clamp(params.neg_low, params.neg_high)
    )
    return ratios.spread(kappa)


@dataclass(frozen=True, slots=True)
class M2poParams(NonnegativeParams):
    """Limit of the second moment of the log ratio (nats^2)."""

    tau: float = 0.04


def _may_be_clipped(log_ratio: Tensor, advantages: Tensor) -> Tensor:
    """Tokens that PPO could clip: those that have moved in the direction of their advantage already."""
    return ((advantages > 0) & (log_ratio > 0)) | ((advantages < 0) & (log_ratio < 0))


def _second_moment_limit(ratios: Ratios, params: M2poParams) -> tuple[float, ...]:
    """Largest squared log ratio of a token that is kept."""
    squares = ratios.log_ratio.double().square()
    candidates = squares[_may_be_clipped(ratios.log_ratio, ratios.token_advantages)].sort().values
    if not len(candidates):
        return (math.inf,)
    means = candidates.cumsum(0) / torch.arange(1, len(candidates) + 1)
    kept = int((means <= params.tau).sum())  # the means of ascending numbers ascend
    if kept == len(candidates):
        return (math.inf,)
    # Half-way to the next: the training pass may round otherwise than the pass that was measured.
    return (float((candidates[kept] + (candidates[kept - 1] if kept else 0)) / 2),)


@weight_kernel("m2po", M2poParams, measure=_second_moment_limit)
def m2po(ratios: Ratios, params: M2poParams) -> Tensor:
    """M2PO (arXiv 2510.01161, algorithm 1): the tokens farthest off are silenced until E[(log r)^2] <= tau.

    The mean is over the tokens of the whole minibatch that PPO could clip; the ratio is to the behaviour policy, as the
    paper writes it.
    """
    (limit,) = ratios.statistics
    silenced = _may_be_clipped(ratios.log_ratio, ratios.token_advantages) & (ratios.log_ratio.square() > limit)
    return bounded_exp(ratios.log_ratio).masked_fill(silenced, 0)
