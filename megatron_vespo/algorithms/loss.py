"""The policy-gradient loss over packed log-probabilities.

    loss = -(1/D) * sum over samples s, tokens t of  stopgrad(kappa_t) * A_s * log pi_t

with kappa from a weight kernel and D a number of the whole global minibatch, known before the forward pass. So the sum
of the returned losses over all microbatches and data-parallel ranks is the minibatch's loss, with no other scaling.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

import torch
from torch import Tensor

from megatron_vespo.algorithms.importance import segment_max, segment_sum, sequence_log_ratio, token_log_ratio
from megatron_vespo.algorithms.weights import Ratios, WeightKernel
from megatron_vespo.errors import UserError


class NonFiniteLogProbError(UserError):
    """A log-probability of a real response token is NaN or +inf.

    Attributes:
        samples: Local indices of the samples it happened in, ascending. The caller knows their names.
    """

    def __init__(self, samples: list[int]) -> None:
        super().__init__(f"log-probabilities of response tokens are NaN or +inf in samples {samples} of the microbatch")
        self.samples = samples


class Aggregation(StrEnum):
    """What the sum over tokens is divided by."""

    TOKEN_MEAN = "token-mean"
    SEQ_MEAN_TOKEN_SUM = "seq-mean-token-sum"


@dataclass(frozen=True, slots=True)
class Denominators:
    """Sizes of the whole global minibatch: all microbatches of all data-parallel ranks.

    Attributes:
        tokens: Response tokens, those of samples with advantage 0 included.
        samples: Samples, those with an empty response or advantage 0 included.

    Raises:
        UserError: One of them is not positive.
    """

    tokens: int
    samples: int

    def __post_init__(self) -> None:
        if self.tokens <= 0 or self.samples <= 0:
            raise UserError(
                f"a minibatch of {self.samples} samples with {self.tokens} response tokens has nothing to learn from; "
                "every response is empty"
            )

    def of(self, aggregation: Aggregation) -> int:
        """The number that ``aggregation`` divides by."""
        return self.tokens if Aggregation(aggregation) is Aggregation.TOKEN_MEAN else self.samples


@dataclass(frozen=True, slots=True)
class PackedLogProbs:
    """Log-probabilities of one microbatch, all samples in one row of T positions, in any order.

    Attributes:
        log_pi: log pi of the token at each position under the current policy (nats), shape [T], requires grad.
        log_mu: log mu of it under the behaviour policy, shape [T], of log_pi's dtype.
        sample_index: Local sample each position belongs to, shape [T], int64; anything where ``mask`` is False.
        mask: True at real response tokens, shape [T], bool. Elsewhere any value is allowed, NaN included.
        num_samples: Samples of the microbatch, S; some may have no tokens.

    Raises:
        TypeError: A dtype is not as above.
        ValueError: The shapes differ.
    """

    log_pi: Tensor
    log_mu: Tensor
    sample_index: Tensor
    mask: Tensor
    num_samples: int

    def __post_init__(self) -> None:
        for name in ("log_pi", "log_mu"):
            dtype = getattr(self, name).dtype
            if dtype not in (torch.float32, torch.float64):
                raise TypeError(
                    f"{name} is {dtype}; log-probabilities must be float32 or float64: log W sums thousands of them, "
                    "and rounding each to 16 bits makes phi wrong by 0.3 at 1024 tokens"
                )
        if self.log_pi.dtype != self.log_mu.dtype:
            raise TypeError(f"log_pi is {self.log_pi.dtype} but log_mu is {self.log_mu.dtype}")
        if self.sample_index.dtype != torch.int64 or self.mask.dtype != torch.bool:
            raise TypeError(f"need int64 sample_index and bool mask, got {self.sample_index.dtype}, {self.mask.dtype}")
        shapes = {tuple(x.shape) for x in (self.log_pi, self.log_mu, self.sample_index, self.mask)}
        if len(shapes) != 1 or self.log_pi.dim() != 1:
            raise ValueError(f"log_pi, log_mu, sample_index and mask must share one shape [T], got {sorted(shapes)}")


@dataclass(frozen=True, slots=True)
class PolicyLossOutput:
    """The loss and, detached, what each sample contributed; every column has shape [S] and log_pi's dtype.

    Attributes:
        loss: Scalar, differentiable; this microbatch's share of the minibatch loss.
        sample_loss: What each sample adds to ``loss``.
        log_w: log W (nats); 0 for an empty response, infinite where pi or mu give a token probability 0.
        kappa: Weight, its mean over the sample's tokens; 0 where log W is infinite or the response empty.
        sum_log_pi: Sum of log pi over the response (nats).
        sum_abs_log_ratio: Sum of |log pi - log mu| over the response (nats).
        max_abs_log_ratio: Largest |log pi - log mu| of the response (nats).
        n_tokens: Response tokens.
    """

    loss: Tensor
    sample_loss: Tensor
    log_w: Tensor
    kappa: Tensor
    sum_log_pi: Tensor
    sum_abs_log_ratio: Tensor
    max_abs_log_ratio: Tensor
    n_tokens: Tensor


def policy_loss[P](
    inputs: PackedLogProbs,
    advantages: Tensor,
    kernel: WeightKernel[P],
    params: P,
    aggregation: Aggregation,
    denominators: Denominators,
) -> PolicyLossOutput:
    """The microbatch's share of the minibatch loss.

    A sample contributes exactly nothing, to loss and gradient, where its advantage is 0, its response is empty, or a
    token of it has probability 0 under pi or mu (log W infinite; kappa is 0 then, whatever the kernel).

    Args:
        inputs: Log-probabilities of S packed samples.
        advantages: Advantage of each sample, shape [S], finite.
        kernel: Weight kernel, see ``weights.KERNELS``.
        params: The kernel's parameters.
        aggregation: ``token-mean`` divides by the minibatch's response tokens, ``seq-mean-token-sum`` by its samples
            (the paper's estimator).
        denominators: Those numbers.

    Raises:
        NonFiniteLogProbError: A log-probability of a real token is NaN or +inf.
        ValueError: The shape of ``advantages`` is wrong, an advantage is not finite, or a real token's sample index is
            out of range.
    """
    num_samples = inputs.num_samples
    if advantages.shape != (num_samples,):
        raise ValueError(f"advantages have shape {tuple(advantages.shape)}, expected ({num_samples},)")
    advantages = advantages.detach().to(inputs.log_pi.dtype)
    # Selecting, not multiplying by the mask: 0 * NaN is NaN, forward and backward.
    log_pi, log_mu, sample_index = (x[inputs.mask] for x in (inputs.log_pi, inputs.log_mu, inputs.sample_index))
    _check(log_pi.detach(), log_mu, sample_index, advantages)

    with torch.no_grad():
        log_ratio = token_log_ratio(log_pi, log_mu)
        log_w = sequence_log_ratio(log_ratio, sample_index, num_samples)
        finite = log_w.isfinite()[sample_index]
        kappa = kernel(Ratios(log_ratio, sample_index, log_w, advantages), params)
        kappa = torch.where(finite, kappa, torch.zeros_like(kappa))
        token_advantages = advantages[sample_index]
        heard = finite & (token_advantages != 0)
        coefficient = kappa * token_advantages / denominators.of(aggregation)

    # Both factors are replaced where a token is not heard, so that neither an infinite log pi nor its gradient is seen.
    zero = torch.zeros_like(coefficient)
    losses = -torch.where(heard, coefficient, zero) * torch.where(heard, log_pi, zero)

    def total(values: Tensor) -> Tensor:
        return segment_sum(values, sample_index, num_samples)

    n_tokens = total(torch.ones_like(kappa))
    return PolicyLossOutput(
        loss=losses.sum(),
        sample_loss=total(losses.detach()),
        log_w=log_w,
        kappa=total(kappa) / n_tokens.clamp(min=1),
        sum_log_pi=total(log_pi.detach()),
        sum_abs_log_ratio=total(log_ratio.abs()),
        max_abs_log_ratio=segment_max(log_ratio.abs(), sample_index, num_samples),
        n_tokens=n_tokens,
    )


def _check(log_pi: Tensor, log_mu: Tensor, sample_index: Tensor, advantages: Tensor) -> None:
    """Refuse bad real tokens. One look at the result in the good case, as each makes a GPU wait."""
    num_samples = advantages.numel()
    bad_token = log_pi.isnan() | log_mu.isnan() | log_pi.isposinf() | log_mu.isposinf()
    bad_index = (sample_index < 0) | (sample_index >= num_samples)
    bad_advantage = ~advantages.isfinite()
    if not (bad_token.any() | bad_index.any() | bad_advantage.any()):
        return
    if bad_index.any():
        raise ValueError(f"sample_index of real tokens must lie in [0, {num_samples}): {sample_index[bad_index][:8]}")
    if bad_advantage.any():
        raise ValueError(f"advantages of samples {bad_advantage.nonzero().flatten().tolist()} are not finite")
    raise NonFiniteLogProbError(sample_index[bad_token].unique().tolist())
