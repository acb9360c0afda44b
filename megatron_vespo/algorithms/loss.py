"""The policy-gradient loss over packed log-probabilities.

    loss = -(1/D) * sum over samples s, tokens t of  stopgrad(kappa_t) * A_s * log pi_t

with kappa from a weight kernel and D a number of the whole global minibatch, known before the forward pass. So the sum
of the returned losses over all microbatches and data-parallel ranks is the minibatch's loss, with no other scaling.

The tokens are read twice, ``TOKENS_PER_CHUNK`` at a time: first for the sums of each sample, log W among them; then,
as kappa needs the whole sample's log W, for kappa, the loss and its gradient. The loss is linear in log pi, so the
gradient, -kappa * A / D, is known in the forward pass already. It is written into one buffer of log_pi's size, which
the backward pass scales in place and hands out. Nothing else is as long as the tokens: beyond its inputs, 20 bytes a
token in float32, the loss needs that gradient, 4 bytes a token, and a few chunks and a few numbers a sample.

Nothing here waits for the device: no value is read on the host, and no shape depends on one. What must be known on the
host to refuse a bad batch is counted in a column, ``n_nonfinite``.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from megatron_vespo.algorithms.importance import (
    add_to_samples,
    is_nonfinite,
    sequence_log_ratio,
    token_chunks,
    token_log_ratio,
)
from megatron_vespo.algorithms.weights import Ratios, WeightKernel
from megatron_vespo.errors import UserError


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
    """Log-probabilities of the R real response tokens of one microbatch; prompts and padding have no place here.

    Attributes:
        log_pi: log pi of each token under the current policy (nats), shape [R], float32 or float64, requires grad.
        log_mu: log mu of it under the behaviour policy, shape [R], of log_pi's dtype.
        entropy: Entropy of pi where the token was drawn (nats), shape [R], of log_pi's dtype, detached.
        sample_index: Local sample each token belongs to, ascending, in [0, num_samples), shape [R], int64.
        num_samples: Samples of the microbatch, S; some may have no tokens.

    Raises:
        TypeError: A dtype is not as above.
        ValueError: The shapes differ.
    """

    log_pi: Tensor
    log_mu: Tensor
    entropy: Tensor
    sample_index: Tensor
    num_samples: int

    def __post_init__(self) -> None:
        for name in ("log_pi", "log_mu"):
            dtype = getattr(self, name).dtype
            if dtype not in (torch.float32, torch.float64):
                raise TypeError(
                    f"{name} is {dtype}; log-probabilities must be float32 or float64: log W sums thousands of them, "
                    "and rounding each to 16 bits makes phi wrong by 0.3 at 1024 tokens"
                )
        for name in ("log_mu", "entropy"):
            if getattr(self, name).dtype != self.log_pi.dtype:
                raise TypeError(f"log_pi is {self.log_pi.dtype} but {name} is {getattr(self, name).dtype}")
        if self.sample_index.dtype != torch.int64:
            raise TypeError(f"need int64 sample_index, got {self.sample_index.dtype}")
        shapes = {tuple(x.shape) for x in (self.log_pi, self.log_mu, self.entropy, self.sample_index)}
        if len(shapes) != 1 or self.log_pi.dim() != 1:
            raise ValueError(f"log_pi, log_mu, entropy and sample_index must share one shape [R], got {sorted(shapes)}")


@dataclass(frozen=True, slots=True)
class PolicyLossOutput:
    """The loss and, detached, what each sample contributed; every column has shape [S] and log_pi's dtype.

    Where ``n_nonfinite`` is positive, log_w is NaN, kappa and sample_loss are 0, and the other sums and the maximum may
    be NaN or infinite; the other samples, and the loss, are what they would be if this sample had advantage 0.

    Attributes:
        loss: Scalar, differentiable once; this microbatch's share of the minibatch loss.
        sample_loss: What each sample adds to ``loss``.
        log_w: log W (nats); 0 for an empty response, infinite where pi or mu give a token probability 0, NaN exactly
            where ``n_nonfinite`` is positive.
        kappa: Weight, its mean over the sample's tokens; 0 where log W is not finite or the response empty.
        sum_log_pi: Sum of log pi over the response (nats).
        sum_abs_log_ratio: Sum of |log pi - log mu| over the response (nats).
        max_abs_log_ratio: Largest |log pi - log mu| of the response (nats).
        sum_entropy: Sum of the entropy over the response (nats).
        n_tokens: Response tokens.
        n_nonfinite: Response tokens whose log pi or log mu is NaN or +inf. The caller must refuse the minibatch if any.
    """

    loss: Tensor
    sample_loss: Tensor
    log_w: Tensor
    kappa: Tensor
    sum_log_pi: Tensor
    sum_abs_log_ratio: Tensor
    max_abs_log_ratio: Tensor
    sum_entropy: Tensor
    n_tokens: Tensor
    n_nonfinite: Tensor


def policy_loss[P](
    inputs: PackedLogProbs,
    advantages: Tensor,
    kernel: WeightKernel[P],
    params: P,
    aggregation: Aggregation,
    denominators: Denominators,
) -> PolicyLossOutput:
    """The microbatch's share of the minibatch loss.

    A sample contributes exactly nothing, to loss and gradient, where its advantage is 0, its response is empty, a token
    of it has probability 0 under pi or mu (log W infinite; kappa is 0 then, whatever the kernel), or a token of it is
    NaN or +inf (``n_nonfinite``). One call of backward is possible.

    Args:
        inputs: Log-probabilities of S packed samples.
        advantages: Advantage of each sample, shape [S]. The caller has seen to it that they are finite.
        kernel: Weight kernel, see ``weights.KERNELS``.
        params: The kernel's parameters.
        aggregation: ``token-mean`` divides by the minibatch's response tokens, ``seq-mean-token-sum`` by its samples
            (the paper's estimator).
        denominators: Those numbers.

    Raises:
        ValueError: The shape of ``advantages`` is wrong.
    """
    num_samples = inputs.num_samples
    if advantages.shape != (num_samples,):
        raise ValueError(f"advantages have shape {tuple(advantages.shape)}, expected ({num_samples},)")
    dtype = inputs.log_pi.dtype
    advantages = advantages.detach().to(dtype)
    with torch.no_grad():
        columns = _sample_columns(inputs)
        log_w = columns["log_w"]
        usable = log_w.isfinite()
        scale = (advantages / -denominators.of(aggregation)).masked_fill(~usable, 0)

        sum_kappa, sample_loss = (torch.zeros_like(log_w, dtype=torch.float64) for _ in range(2))
        gradient = torch.empty_like(inputs.log_pi)
        for chunk in token_chunks(gradient.numel()):
            log_pi, log_mu, sample_index = inputs.log_pi[chunk], inputs.log_mu[chunk], inputs.sample_index[chunk]
            kappa = kernel(Ratios(token_log_ratio(log_pi, log_mu), sample_index, log_w, advantages), params)
            token_scale = scale.index_select(0, sample_index)
            # Filled as well, because 0 * NaN is NaN: kappa may be anything where the scale is 0.
            gradient[chunk] = (kappa * token_scale).masked_fill_(token_scale == 0, 0)
            add_to_samples(sum_kappa, sample_index, kappa)
            add_to_samples(sample_loss, sample_index, gradient[chunk] * log_pi)
        # Infinite and NaN tokens have spoilt the sums of their own samples only.
        kappa_mean = (sum_kappa / columns["n_tokens"].clamp(min=1)).masked_fill(~usable, 0).to(dtype)
        sample_loss = sample_loss.masked_fill(~usable, 0)
        loss = sample_loss.sum().to(dtype)
    return PolicyLossOutput(
        loss=_KnownGradient.apply(inputs.log_pi, loss, gradient),
        sample_loss=sample_loss.to(dtype),
        kappa=kappa_mean,
        **columns,
    )


def _sample_columns(inputs: PackedLogProbs) -> dict[str, Tensor]:
    """The columns of ``PolicyLossOutput`` that need neither advantages nor kappa."""
    names = ("log_w", "sum_log_pi", "sum_abs_log_ratio", "sum_entropy", "n_tokens", "n_nonfinite")
    sums = {name: inputs.log_pi.new_zeros(inputs.num_samples, dtype=torch.float64) for name in names}
    largest = inputs.log_pi.new_zeros(inputs.num_samples)
    for chunk in token_chunks(inputs.log_pi.numel()):
        log_pi, log_mu, sample_index = inputs.log_pi[chunk], inputs.log_mu[chunk], inputs.sample_index[chunk]
        log_ratio = token_log_ratio(log_pi, log_mu)
        add_to_samples(sums["log_w"], sample_index, log_ratio)
        add_to_samples(sums["sum_log_pi"], sample_index, log_pi)
        add_to_samples(sums["sum_abs_log_ratio"], sample_index, log_ratio.abs())
        add_to_samples(sums["sum_entropy"], sample_index, inputs.entropy[chunk])
        add_to_samples(sums["n_tokens"], sample_index, torch.ones_like(log_pi))
        add_to_samples(sums["n_nonfinite"], sample_index, is_nonfinite(log_pi, log_mu))
        largest.scatter_reduce_(0, sample_index, log_ratio.abs(), reduce="amax")
    columns = {name: total.to(inputs.log_pi.dtype) for name, total in sums.items()}
    columns["log_w"] = sequence_log_ratio(columns["log_w"], columns["n_nonfinite"])
    return columns | {"max_abs_log_ratio": largest}


class _KnownGradient(torch.autograd.Function):
    """``value``, whose gradient with respect to ``variable`` is known: the buffer ``gradient``.

    The buffer is not copied: backward scales it in place and gives it away, so there can be one backward only.
    """

    @staticmethod
    def forward(ctx: Any, variable: Tensor, value: Tensor, gradient: Tensor) -> Tensor:
        ctx.gradient = gradient
        return value.clone()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor, None, None]:
        gradient, ctx.gradient = ctx.gradient, None
        if gradient is None:
            raise RuntimeError("a second backward through policy_loss; its gradient was given away in the first")
        return gradient.mul_(grad_output), None, None
