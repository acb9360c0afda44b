"""What a microbatch's log-probabilities are trained for: the policy-gradient loss, or next-token prediction.

An objective turns one microbatch into a loss, already divided by a number of the whole global minibatch, and one row of
figures for each sample. The policy does the rest (scaling, reduction over ranks) the same way for all of them. Nothing
here waits for the device: what is wrong with a sample is one more figure of it, looked at when the minibatch is done.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Protocol

import torch
from torch import Tensor

from megatron_vespo.algorithms.importance import segment_sum
from megatron_vespo.algorithms.loss import Aggregation, Denominators, PackedLogProbs, policy_loss
from megatron_vespo.algorithms.weights import WeightKernel
from megatron_vespo.errors import UserError
from megatron_vespo.policy.logprobs import TokenLogProbs
from megatron_vespo.policy.packing import PackedBatch
from megatron_vespo.types import Sample

Columns = dict[str, Tensor]
"""Figures of the S samples of a microbatch by name, each [S]."""

NONFINITE = "nonfinite"
"""Name of the figure that every objective has: tokens whose log-probability cannot be used."""


class Objective(Protocol):
    """A loss over packed log-probabilities."""

    @property
    def columns(self) -> tuple[str, ...]:
        """Names of the figures, the same on every rank."""

    def trains(self, sample: Sample) -> bool:
        """Whether the sample has a gradient at all; the others are only measured."""

    def __call__(self, batch: PackedBatch, logprobs: TokenLogProbs) -> tuple[Tensor, Columns]:
        """The microbatch's share of the loss and each sample's figures."""


def denominators(samples: Sequence[Sample]) -> Denominators:
    """Of a global minibatch; every rank holds all of it, so they are known before the first forward pass."""
    return Denominators(tokens=sum(len(sample.response_ids) for sample in samples), samples=len(samples))


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
    columns: ClassVar[tuple[str, ...]] = (
        "loss",
        "log_w",
        "phi",
        "abs_log_ratio",
        "max_abs_log_ratio",
        "entropy",
        "tokens",
        NONFINITE,
    )

    def trains(self, sample: Sample) -> bool:
        """A sample of advantage 0 has no gradient.

        Raises:
            UserError: Its advantage is not finite.
        """
        if not math.isfinite(sample.advantage):
            raise UserError(f"the advantage of sample {sample.name} is {sample.advantage}")
        return sample.advantage != 0

    def __call__(self, batch: PackedBatch, logprobs: TokenLogProbs) -> tuple[Tensor, Columns]:
        """The microbatch's share of the loss and each sample's figures."""
        inputs = PackedLogProbs(
            logprobs.log_pi,
            batch.log_mu.to(logprobs.log_pi.dtype),
            logprobs.entropy,
            batch.sample_index,
            batch.num_samples,
        )
        output = policy_loss(inputs, batch.advantages, self.kernel, self.params, self.aggregation, self.denominators)
        columns = (
            output.sample_loss,
            output.log_w,
            output.kappa,
            output.sum_abs_log_ratio,
            output.max_abs_log_ratio,
            output.sum_entropy,
            output.n_tokens,
            output.n_nonfinite,
        )
        return output.loss, dict(zip(self.columns, columns, strict=True))


@dataclass(frozen=True)
class NextToken:
    """Supervised next-token prediction: mean negative log-likelihood of the response tokens of the global minibatch."""

    denominators: Denominators
    columns: ClassVar[tuple[str, ...]] = ("loss", "correct", "tokens", NONFINITE)

    def trains(self, sample: Sample) -> bool:
        """Every sample does."""
        return True

    def __call__(self, batch: PackedBatch, logprobs: TokenLogProbs) -> tuple[Tensor, Columns]:
        """The microbatch's share of the loss and each sample's figures."""
        log_pi = logprobs.log_pi.detach()

        def total(values: Tensor) -> Tensor:
            return segment_sum(values, batch.sample_index, batch.num_samples)

        columns = (
            -total(log_pi) / self.denominators.tokens,
            total(logprobs.correct.to(log_pi.dtype)),
            total(torch.ones_like(log_pi)),
            total((~log_pi.isfinite()).to(log_pi.dtype)),
        )
        return -logprobs.log_pi.sum() / self.denominators.tokens, dict(zip(self.columns, columns, strict=True))
