"""The policy-gradient loss over packed log-probabilities.

    loss = -sum over samples s, tokens t of  agg_s * stopgrad(kappa_t) * A_s * log pi_t   [+ KL and entropy terms]

with kappa from a weight kernel, and agg from the sample's own length and numbers of the whole global minibatch that are
known before the forward pass. So the sum of the returned losses over all microbatches and data-parallel ranks is the
minibatch's loss, with no other scaling.

The tokens are read twice, ``TOKENS_PER_CHUNK`` at a time: first for the sums of each sample, log W among them; then,
as kappa needs the whole sample's log W, for kappa, the loss and its gradient. The loss is linear in log pi, so the
gradient, -agg * kappa * A, is known in the forward pass already. It is written into one buffer of log_pi's size, which
the backward pass scales in place and hands out. Nothing else is as long as the tokens: beyond its inputs, 20 bytes a
token in float32, the loss needs that gradient, 4 bytes a token, and a few chunks and a few numbers a sample.

Nothing here waits for the device: no value is read on the host, and no shape depends on one. What must be known on the
host to refuse a bad batch is counted in a column, ``n_nonfinite``.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from megatron_vespo.algorithms.aggregation import Aggregation, Denominators
from megatron_vespo.algorithms.importance import (
    add_to_samples,
    is_nonfinite,
    sequence_log_ratio,
    token_chunks,
    token_log_ratio,
)
from megatron_vespo.algorithms.weights import MAX_LOG_RATIO, Ratios, Weighting, token_ratios


@dataclass(frozen=True, slots=True)
class Regularization:
    """Terms beside the policy gradient, both off by default; they are aggregated as the policy gradient is.

    Attributes:
        kl_coef: Coefficient of the KL divergence from a reference policy; needs ``PackedLogProbs.log_ref``.
        kl_estimator: With d = log pi_ref - log pi of a token: ``k3`` is exp(d) - d - 1, GRPO's (arXiv 2402.03300, eq.
            4), never negative; ``k2`` is d^2 / 2, whose gradient is that of KL(pi, pi_ref) where the samples are pi's.
        entropy_coef: Coefficient of the entropy, which is made larger; its gradient is exact, over the vocabulary.
    """

    kl_coef: float = 0.0
    kl_estimator: Literal["k2", "k3"] = "k3"
    entropy_coef: float = 0.0

    @property
    def is_on(self) -> bool:
        """Whether samples of advantage 0 have a gradient too."""
        return self.kl_coef != 0 or self.entropy_coef != 0

    def kl(self, log_pi: Tensor, log_ref: Tensor) -> tuple[Tensor, Tensor]:
        """The estimate of each token and its derivative with respect to log pi, both of log_pi's shape."""
        d = (log_ref - log_pi).clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO)
        if self.kl_estimator == "k2":
            return d.square() / 2, -d
        return torch.expm1(d) - d, -torch.expm1(d)


NO_REGULARIZATION = Regularization()


@dataclass(frozen=True, slots=True)
class PackedLogProbs:
    """Log-probabilities of the R real response tokens of one microbatch; prompts and padding have no place here.

    Attributes:
        log_pi: log pi of each token under the current policy (nats), shape [R], float32 or float64, requires grad.
        log_mu: log mu of it under the behaviour policy, shape [R], of log_pi's dtype.
        entropy: Entropy of pi where the token was drawn (nats), shape [R], of log_pi's dtype; detached, unless
            ``Regularization.entropy_coef`` is not 0.
        sample_index: Local sample each token belongs to, ascending, in [0, num_samples), shape [R], int64.
        num_samples: Samples of the microbatch, S; some may have no tokens.
        log_old: log pi_old of each token, under the trainer's policy as the step began, shape [R]; None: it is log_mu.
        log_ref: log pi_ref of it, under the reference policy, shape [R]; None: there is none.

    Raises:
        TypeError: A dtype is not as above.
        ValueError: The shapes differ.
    """

    log_pi: Tensor
    log_mu: Tensor
    entropy: Tensor
    sample_index: Tensor
    num_samples: int
    log_old: Tensor | None = None
    log_ref: Tensor | None = None

    def __post_init__(self) -> None:
        for name in ("log_pi", "log_mu"):
            dtype = getattr(self, name).dtype
            if dtype not in (torch.float32, torch.float64):
                raise TypeError(
                    f"{name} is {dtype}; log-probabilities must be float32 or float64: log W sums thousands of them, "
                    "and rounding each to 16 bits makes phi wrong by 0.3 at 1024 tokens"
                )
        others = {"log_mu": self.log_mu, "entropy": self.entropy, "log_old": self.log_old, "log_ref": self.log_ref}
        given = {name: values for name, values in others.items() if values is not None}
        for name, values in given.items():
            if values.dtype != self.log_pi.dtype:
                raise TypeError(f"log_pi is {self.log_pi.dtype} but {name} is {values.dtype}")
        if self.sample_index.dtype != torch.int64:
            raise TypeError(f"need int64 sample_index, got {self.sample_index.dtype}")
        shapes = {tuple(x.shape) for x in (self.log_pi, self.sample_index, *given.values())}
        if len(shapes) != 1 or self.log_pi.dim() != 1:
            raise ValueError(f"log_pi, {', '.join(given)} and sample_index must share one shape [R], got {shapes}")

    def chunks(self) -> Iterator[tuple[slice, PackedLogProbs]]:
        """Views of at most ``TOKENS_PER_CHUNK`` tokens, each with its place."""
        for chunk in token_chunks(self.log_pi.numel()):
            yield (
                chunk,
                PackedLogProbs(
                    self.log_pi[chunk],
                    self.log_mu[chunk],
                    self.entropy[chunk],
                    self.sample_index[chunk],
                    self.num_samples,
                    None if self.log_old is None else self.log_old[chunk],
                    None if self.log_ref is None else self.log_ref[chunk],
                ),
            )


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
        log_drift: Sum of log pi - log pi_old over the response (nats), in the same way; log_w where pi_old is mu.
        kappa: Weight, its mean over the sample's tokens; 0 where log W is not finite or the response empty.
        sum_log_pi: Sum of log pi over the response (nats).
        sum_abs_log_ratio: Sum of |log pi - log mu| over the response (nats).
        max_abs_log_ratio: Largest |log pi - log mu| of the response (nats).
        sum_entropy: Sum of the entropy over the response (nats).
        sum_kl_ref: Sum of the KL estimate from the reference policy over the response (nats); 0 without one.
        n_tokens: Response tokens.
        n_nonfinite: Response tokens one of whose log-probabilities is NaN or +inf. The caller must refuse
            the minibatch if any.
    """

    loss: Tensor
    sample_loss: Tensor
    log_w: Tensor
    log_drift: Tensor
    kappa: Tensor
    sum_log_pi: Tensor
    sum_abs_log_ratio: Tensor
    max_abs_log_ratio: Tensor
    sum_entropy: Tensor
    sum_kl_ref: Tensor
    n_tokens: Tensor
    n_nonfinite: Tensor


def policy_loss(
    inputs: PackedLogProbs,
    advantages: Tensor,
    weighting: Weighting,
    aggregation: Aggregation,
    denominators: Denominators,
    regularization: Regularization = NO_REGULARIZATION,
) -> PolicyLossOutput:
    """The microbatch's share of the minibatch loss.

    A sample contributes exactly nothing, to loss and gradient, where its response is empty, a token of it has
    probability 0 under pi, pi_old or mu (log W infinite; kappa is 0 then, whatever the kernel), or a token of it is NaN
    or +inf (``n_nonfinite``); where its advantage is 0 it contributes to the regularization alone. One call of backward
    is possible.

    Args:
        inputs: Log-probabilities of S packed samples.
        advantages: Advantage of each sample, shape [S]. The caller has seen to it that they are finite.
        weighting: From ratios to kappa.
        aggregation: What the sum is divided by.
        denominators: Those numbers.
        regularization: Further terms of the loss.

    Raises:
        ValueError: The shape of ``advantages`` is wrong, or the reference's log-probabilities are missing.
    """
    if advantages.shape != (inputs.num_samples,):
        raise ValueError(f"advantages have shape {tuple(advantages.shape)}, expected ({inputs.num_samples},)")
    if regularization.kl_coef and inputs.log_ref is None:
        raise ValueError("a KL term needs log_ref, the reference policy's log-probabilities")
    dtype = inputs.log_pi.dtype
    advantages = advantages.detach().to(dtype)
    with torch.no_grad():
        columns = _sample_columns(inputs, regularization)
        usable = columns["log_w"].isfinite() & columns["log_drift"].isfinite()
        share = _share(columns["n_tokens"], aggregation, denominators).masked_fill(~usable, 0)
        scale = -advantages * share

        sum_kappa, sample_loss = (torch.zeros_like(share, dtype=torch.float64) for _ in range(2))
        gradient = torch.empty_like(inputs.log_pi)
        for place, chunk in inputs.chunks():
            kappa = weighting(_chunk_ratios(chunk, columns, advantages, weighting))
            token_scale = scale.index_select(0, chunk.sample_index)
            # Filled as well, because 0 * NaN is NaN: kappa may be anything where the scale is 0.
            gradient[place] = (kappa * token_scale).masked_fill_(token_scale == 0, 0)
            add_to_samples(sum_kappa, chunk.sample_index, kappa)
            add_to_samples(sample_loss, chunk.sample_index, gradient[place] * chunk.log_pi)
            if regularization.kl_coef:
                gradient[place] += _kl_gradient(chunk, share, regularization)
        if regularization.is_on:
            kl, entropy = regularization.kl_coef * columns["sum_kl_ref"], columns["sum_entropy"]
            sample_loss += share * (kl - regularization.entropy_coef * entropy)
        # Infinite and NaN tokens have spoilt the sums of their own samples only.
        kappa_mean = (sum_kappa / columns["n_tokens"].clamp(min=1)).masked_fill(~usable, 0).to(dtype)
        sample_loss = sample_loss.masked_fill(~usable, 0)
    loss = _KnownGradient.apply(inputs.log_pi, sample_loss.sum().to(dtype), gradient)
    if regularization.entropy_coef:
        gradient_of_entropy = -regularization.entropy_coef * share.index_select(0, inputs.sample_index)
        # Its value is in the loss already.
        loss = loss + _KnownGradient.apply(inputs.entropy, torch.zeros_like(loss), gradient_of_entropy)
    return PolicyLossOutput(loss=loss, sample_loss=sample_loss.to(dtype), kappa=kappa_mean, **columns)


def _share(n_tokens: Tensor, aggregation: Aggregation, denominators: Denominators) -> Tensor:
    """What each token of a sample counts in the loss, shape [S]."""
    share = torch.full_like(n_tokens, 1 / denominators.of(aggregation))
    return share / n_tokens.clamp(min=1) if aggregation == Aggregation.SEQ_MEAN_TOKEN_MEAN else share


def _chunk_ratios(
    chunk: PackedLogProbs, columns: dict[str, Tensor], advantages: Tensor, weighting: Weighting
) -> Ratios:
    return Ratios(
        *token_ratios(chunk.log_pi, chunk.log_mu, chunk.log_old),
        chunk.sample_index,
        columns["log_w"],
        columns["log_drift"],
        columns["n_tokens"],
        advantages,
        weighting.statistics,
    )


def _kl_gradient(chunk: PackedLogProbs, share: Tensor, regularization: Regularization) -> Tensor:
    assert chunk.log_ref is not None
    token_share = share.index_select(0, chunk.sample_index)
    derivative = regularization.kl(chunk.log_pi, chunk.log_ref)[1]
    return (regularization.kl_coef * token_share * derivative).masked_fill_(token_share == 0, 0)


def _sample_columns(inputs: PackedLogProbs, regularization: Regularization) -> dict[str, Tensor]:
    """The columns of ``PolicyLossOutput`` that need neither advantages nor kappa."""
    names = ("log_w", "log_drift", "sum_log_pi", "sum_abs_log_ratio", "sum_entropy", "sum_kl_ref")
    sums = {
        name: inputs.log_pi.new_zeros(inputs.num_samples, dtype=torch.float64)
        for name in (*names, "n_tokens", "n_nonfinite")
    }
    largest = inputs.log_pi.new_zeros(inputs.num_samples)
    for _, chunk in inputs.chunks():
        log_ratio = token_log_ratio(chunk.log_pi, chunk.log_mu)
        nonfinite = is_nonfinite(chunk.log_pi, chunk.log_mu)
        tokens = {"log_w": log_ratio, "sum_log_pi": chunk.log_pi, "sum_abs_log_ratio": log_ratio.abs()}
        if chunk.log_old is not None:
            tokens["log_drift"] = token_log_ratio(chunk.log_pi, chunk.log_old)
            nonfinite = nonfinite | is_nonfinite(chunk.log_old, chunk.log_mu)
        if chunk.log_ref is not None:
            tokens["sum_kl_ref"] = regularization.kl(chunk.log_pi, chunk.log_ref)[0]
            nonfinite = nonfinite | is_nonfinite(chunk.log_ref, chunk.log_mu)
        tokens |= {"sum_entropy": chunk.entropy, "n_tokens": torch.ones_like(log_ratio), "n_nonfinite": nonfinite}
        for name, values in tokens.items():
            add_to_samples(sums[name], chunk.sample_index, values)
        largest.scatter_reduce_(0, chunk.sample_index, log_ratio.abs(), reduce="amax")
    columns = {name: total.to(inputs.log_pi.dtype) for name, total in sums.items()}
    columns["log_w"] = sequence_log_ratio(columns["log_w"], columns["n_nonfinite"])
    columns["log_drift"] = (
        columns["log_w"] if inputs.log_old is None else sequence_log_ratio(columns["log_drift"], columns["n_nonfinite"])
    )
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
