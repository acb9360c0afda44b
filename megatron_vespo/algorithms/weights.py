"""Weight kernels: how much each token's gradient counts.

Every policy-gradient method here is one detached weight kappa on grad log pi,

    loss = -sum over tokens t of  agg_t * stopgrad(kappa_t) * A_s(t) * log pi_t ,

so a method is a small pure function from the importance ratios to kappa. ``KERNELS`` names them all. A sequence-level
kernel computes kappa per sample and gives it to every token of the sample; a token-level kernel uses the per-token
ratios. Clipping is a kappa of 0 at the clipped tokens.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from megatron_vespo.errors import UserError

# exp(88.7) is the largest a float32 holds.
MAX_LOG_W_LIMIT = 88.0


@dataclass(frozen=True, slots=True)
class Ratios:
    """What a kernel may look at: real response tokens only, no padding, nothing that requires grad.

    The T tokens may be a part of the microbatch's: the loss calls the kernel once for each chunk of tokens, and a chunk
    may begin or end within a sample. What belongs to a sample is always whole. So a kernel gives each token its kappa
    from that token and its sample alone; it must not sum or count over ``log_ratio``.

    Attributes:
        log_ratio: log pi - log mu of each token (nats), shape [T], float32 or float64; NaN and infinities are possible.
        sample_index: Local sample each token belongs to, in [0, S), shape [T], int64.
        log_w: Sum of the log ratio over all tokens of each sample, shape [S]; 0 for an empty response, infinite or NaN
            as ``importance.sequence_log_ratio`` says.
        advantages: Advantage of each sample, shape [S].
    """

    log_ratio: Tensor
    sample_index: Tensor
    log_w: Tensor
    advantages: Tensor


@dataclass(frozen=True, slots=True)
class WeightKernel[P]:
    """A named weight function with the dataclass of its parameters. Call it to get kappa, shape [T].

    kappa of a sample whose log W is not finite is never used: ``policy_loss`` drops such samples.
    """

    name: str
    params_type: type[P]
    function: Callable[[Ratios, P], Tensor]

    def __call__(self, ratios: Ratios, params: P) -> Tensor:
        """Kappa of each token, shape [T], of the ratios' dtype."""
        return self.function(ratios, params)


KERNELS: dict[str, WeightKernel[Any]] = {}


def weight_kernel[P](name: str, params_type: type[P]) -> Callable[[Callable[[Ratios, P], Tensor]], WeightKernel[P]]:
    """Decorator that registers a weight function under ``name``."""

    def register(function: Callable[[Ratios, P], Tensor]) -> WeightKernel[P]:
        if name in KERNELS:
            raise ValueError(f"weight kernel {name!r} is defined twice")
        kernel = WeightKernel(name, params_type, function)
        KERNELS[name] = kernel
        return kernel

    return register


def get_kernel(name: str) -> WeightKernel[Any]:
    """The kernel of that name.

    Raises:
        UserError: There is none.
    """
    if name not in KERNELS:
        raise UserError(f"unknown algorithm {name!r}; there are: {', '.join(sorted(KERNELS))}")
    return KERNELS[name]


@dataclass(frozen=True, slots=True)
class VespoParams:
    """Shape of phi for each sign of the advantage; the defaults are the paper's and its authors' code's.

    Attributes:
        c1_pos: Power of W where the advantage is >= 0 (k in the authors' code).
        c2_pos: Rate of the exponential where the advantage is >= 0 (lambda there).
        c1_neg: Power of W where the advantage is < 0.
        c2_neg: Rate of the exponential where the advantage is < 0.
        log_w_limit: Upper limit of log W (nats) inside phi, so that exp(log W) stays finite; at most 88.

    Raises:
        UserError: A value is not positive and finite, or the limit is above what exp holds in float32.
    """

    c1_pos: float = 2.0
    c2_pos: float = 3.0
    c1_neg: float = 3.0
    c2_neg: float = 2.0
    log_w_limit: float = 80.0

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


def vespo_phi(log_w: Tensor, c1: float, c2: float, log_w_limit: float) -> Tensor:
    """phi(W) = W^c1 * exp(c2 * (1 - W)), from log W (arXiv 2602.10693).

    phi(1) = 1; phi(0) = phi(inf) = 0 exactly, as where phi underflows; at most (c1/c2)^c1 * exp(c2 - c1), at
    W = c1/c2. A log W of NaN (0/0) gives 0.

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


@weight_kernel("vespo", VespoParams)
def vespo(ratios: Ratios, params: VespoParams) -> Tensor:
    """VESPO: kappa = phi(W) of the whole sequence, without length normalisation (arXiv 2602.10693)."""
    limit = params.log_w_limit
    phi = torch.where(
        ratios.advantages >= 0,
        vespo_phi(ratios.log_w, params.c1_pos, params.c2_pos, limit),
        vespo_phi(ratios.log_w, params.c1_neg, params.c2_neg, limit),
    )
    return phi.index_select(0, ratios.sample_index)


@dataclass(frozen=True, slots=True)
class ReinforceParams:
    """REINFORCE has no parameters."""


@weight_kernel("reinforce", ReinforceParams)
def reinforce(ratios: Ratios, params: ReinforceParams) -> Tensor:
    """REINFORCE (Williams 1992): kappa = 1, no correction for samples that are off-policy."""
    return torch.ones_like(ratios.log_ratio)
