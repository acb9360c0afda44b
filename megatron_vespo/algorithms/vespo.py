"""The VESPO kernel (arXiv 2602.10693)."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_vespo.algorithms.weights import Ratios, weight_kernel
from megatron_vespo.errors import UserError

# exp(88.7) is the largest a float32 holds.
MAX_LOG_W_LIMIT = 88.0


@dataclass(frozen=True, slots=True)
class VespoParams:
    """Shape of phi for each sign of the advantage; the defaults are the paper's and its authors' code's.

    Attributes:
        c1_pos: Power of W where the advantage is >= 0 (``k_pos`` in other implementations).
        c2_pos: Rate of the exponential where the advantage is >= 0 (``lambda_pos``).
        c1_neg: Power of W where the advantage is < 0 (``k_neg``).
        c2_neg: Rate of the exponential where the advantage is < 0 (``lambda_neg``).
        log_w_limit: Upper limit of log W (nats) inside phi, so that exp(log W) stays finite; at most 88.
        log_w_floor_pos: Lower limit of the drift log pi/pi_old (nats) inside phi where the advantage is >= 0; the paper
            has none. With 0, good responses that updates have made unlikely keep their weight and pull the policy
            back, where phi(W) falls silent; PPO's clip has the same asymmetry. The mismatch pi_old/mu is not limited:
            what never was the policy's stays silent, as far as pi_old is known (``behavior_logprobs: both``).

    Raises:
        UserError: A value is not positive and finite, the limit above what exp holds in float32, or the floor above 0.
    """

    c1_pos: float = 2.0
    c2_pos: float = 3.0
    c1_neg: float = 3.0
    c2_neg: float = 2.0
    log_w_limit: float = 80.0
    log_w_floor_pos: float = -math.inf

    def __post_init__(self) -> None:
        for name in ("c1_pos", "c2_pos", "c1_neg", "c2_neg", "log_w_limit"):
            value = getattr(self, name)
            if not (math.isfinite(value) and value > 0):
                raise UserError(f"vespo: {name} must be a positive number, got {value}")
        if self.log_w_limit > MAX_LOG_W_LIMIT:
            raise UserError(
                f"vespo: log_w_limit must be at most {MAX_LOG_W_LIMIT:g}, got {self.log_w_limit}: "
                "exp of more overflows float32"
            )
        if not self.log_w_floor_pos <= 0:
            raise UserError(f"vespo: log_w_floor_pos must be 0, below, or -.inf for none, got {self.log_w_floor_pos}")


def vespo_phi(log_w: Tensor, c1: float, c2: float, log_w_limit: float) -> Tensor:
    """phi(W) = W^c1 * exp(c2 * (1 - W)), from log W (arXiv 2602.10693).

    phi(1) = 1; phi(0) = phi(inf) = 0 exactly, as where phi underflows; at most ``largest_phi``. A log W of NaN (0/0)
    gives 0.

    Args:
        log_w: log W of each sample (nats), shape [S], any value.
        c1: Power of W, > 0.
        c2: Rate of the exponential, > 0.
        log_w_limit: log W is clamped to this from above. Below no limit is needed: phi underflows by itself.

    Returns:
        phi, shape [S].
    """
    x = log_w.clamp(max=log_w_limit)
    # expm1 keeps 1 - W exact to rounding near W = 1, where almost all samples of a healthy run are.
    phi = torch.exp(c1 * x - c2 * torch.expm1(x))
    return torch.where(log_w.isfinite(), phi, torch.zeros_like(phi))


def sample_phi(log_w: Tensor, log_drift: Tensor, advantages: Tensor, params: VespoParams) -> Tensor:
    """Weight phi of each sample by the sign of its advantage.

    Args:
        log_w: log pi/mu of each sample (nats), [S].
        log_drift: log pi/pi_old of it, [S]; log_w where pi_old is mu.
        advantages: [S].
        params: Shape of phi, and the floor of the drift.
    """
    # Not where log W is infinite: such samples have phi 0.
    lift = (params.log_w_floor_pos - log_drift).clamp(min=0).nan_to_num(nan=0.0, posinf=0.0)
    return torch.where(
        advantages >= 0,
        vespo_phi(log_w + lift, params.c1_pos, params.c2_pos, params.log_w_limit),
        vespo_phi(log_w, params.c1_neg, params.c2_neg, params.log_w_limit),
    )


def largest_phi(c1: float, c2: float) -> float:
    """Sup phi = (c1/c2)^c1 * exp(c2 - c1), at W = c1/c2: 1.208 for (2, 3), 1.242 for (3, 2)."""
    return (c1 / c2) ** c1 * math.exp(c2 - c1)


def _bound(params: VespoParams) -> float:
    return max(largest_phi(params.c1_pos, params.c2_pos), largest_phi(params.c1_neg, params.c2_neg))


@weight_kernel(
    "vespo",
    VespoParams,
    bound=_bound,
    aliases={"k_pos": "c1_pos", "lambda_pos": "c2_pos", "k_neg": "c1_neg", "lambda_neg": "c2_neg"},
)
def vespo(ratios: Ratios, params: VespoParams) -> Tensor:
    """VESPO: kappa = phi(W) of the whole sequence, without length normalisation (arXiv 2602.10693)."""
    return ratios.spread(sample_phi(ratios.log_w, ratios.sum_log_drift, ratios.advantages, params))
