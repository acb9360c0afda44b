"""What a microbatch's log-probabilities are trained for: the policy-gradient loss, or next-token prediction.

An objective turns one microbatch into a loss, already divided by a number of the whole global minibatch, and one row of
figures for each sample. The policy does the rest (scaling, reduction over ranks) the same way for all of them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_vespo.algorithms.importance import segment_sum
from megatron_vespo.algorithms.loss import (
    Aggregation,
    Denominators,
    NonFiniteLogProbError,
    PackedLogProbs,
    policy_loss,
)
from megatron_vespo.algorithms.weights import WeightKernel
from megatron_vespo.errors import UserError
from megatron_vespo.policy.logprobs import TokenLogProbs
from megatron_vespo.policy.packing import PackedBatch
from megatron_vespo.types import Sample

Columns = dict[str, Tensor]
"""Figures of the S samples of a microbatch by name, each [S]."""
Objective = Callable[[PackedBatch, TokenLogProbs], tuple[Tensor, Columns]]


def denominators(samples: Sequence[Sample]) -> Denominators:
    """Of a global minibatch; every rank holds all of it, so they are known before the first forward pass."""
    return Denominators(tokens=sum(len(sample.response_ids) for sample in samples), samples=len(samples))


def _per_sample(values: Tensor, batch: PackedBatch) -> Tensor:
    """Sums over each sample's response tokens, [S]."""
    return segment_sum(values[batch.mask], batch.sample_index[batch.mask], batch.num_samples)


@dataclass(frozen=True)
class PolicyGradient:
    """The policy-gradient loss with a weight kernel, for one global minibatch.

    Attributes:
        kernel: Weight kernel.
        params: Its parameters.
        aggregation: Divisor of the loss.
        denominators: Sizes of the global minibatch.
    """

    kernel: WeightKernel[object]
    params: object
    aggregation: Aggregation
    denominators: Denominators

    def __call__(self, batch: PackedBatch, logprobs: TokenLogProbs) -> tuple[Tensor, Columns]:
        """The microbatch's share of the loss and each sample's figures."""
        inputs = PackedLogProbs(
            logprobs.log_pi, batch.log_mu.to(logprobs.log_pi.dtype), batch.sample_index, batch.mask, batch.num_samples
        )
        try:
            output = policy_loss(
                inputs, batch.advantages, self.kernel, self.params, self.aggregation, self.denominators
            )
        except NonFiniteLogProbError as error:
            bad = ", ".join(batch.names[i] for i in error.samples)
            raise UserError(
                f"log-probabilities of response tokens are NaN or infinite in samples {bad} (prompt/response);"
                " the weights have probably diverged: lower megatron.lr or go back to an earlier checkpoint"
            ) from error
        columns = {
            "loss": output.sample_loss,
            "log_w": output.log_w,
            "phi": output.kappa,
            "abs_log_ratio": output.sum_abs_log_ratio,
            "max_abs_log_ratio": output.max_abs_log_ratio,
            "entropy": _per_sample(logprobs.entropy, batch),
            "tokens": output.n_tokens,
        }
        return output.loss, columns


@dataclass(frozen=True)
class NextToken:
    """Supervised next-token prediction: mean negative log-likelihood of the response tokens of the global minibatch."""

    denominators: Denominators

    def __call__(self, batch: PackedBatch, logprobs: TokenLogProbs) -> tuple[Tensor, Columns]:
        """The microbatch's share of the loss and each sample's figures."""
        log_pi = logprobs.log_pi[batch.mask]
        if not bool(log_pi.isfinite().all()):
            bad = batch.sample_index[batch.mask][~log_pi.isfinite()].unique().tolist()
            names = ", ".join(batch.names[i] for i in bad)
            raise UserError(f"the loss is NaN or infinite in samples {names} (prompt/response); lower megatron.lr")
        loss = -log_pi.sum() / self.denominators.tokens
        columns = {
            "loss": -_per_sample(logprobs.log_pi.detach(), batch) / self.denominators.tokens,
            "correct": _per_sample(logprobs.correct.to(torch.float32), batch),
            "tokens": _per_sample(torch.ones_like(logprobs.log_pi), batch),
        }
        return loss, columns
