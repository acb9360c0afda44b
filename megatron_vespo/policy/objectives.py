"""What a microbatch's log-probabilities are trained for: the policy-gradient loss, or next-token prediction.

An objective turns one microbatch into a loss, already divided by a number of the whole global minibatch, and one row of
figures for each sample. The policy does the rest (scaling, reduction over ranks) the same way for all of them. Nothing
here waits for the device: what is wrong with a sample is one more figure of it, looked at when the minibatch is done.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar, Protocol

import numpy as np
import torch
from torch import Tensor

from megatron_vespo.algorithms.aggregation import Aggregation, Denominators
from megatron_vespo.algorithms.importance import segment_sum
from megatron_vespo.algorithms.loss import NO_REGULARIZATION, PackedLogProbs, Regularization, policy_loss
from megatron_vespo.algorithms.weights import Ratios, Weighting, whole_ratios
from megatron_vespo.errors import UserError
from megatron_vespo.policy.logprobs import TokenLogProbs
from megatron_vespo.policy.packing import PackedBatch
from megatron_vespo.types import FloatArray, Sample

Columns = dict[str, Tensor]
"""Figures of the S samples of a microbatch by name, each [S]."""

NONFINITE = "nonfinite"
"""Name of the figure that every objective has: tokens whose log-probability cannot be used."""


class Objective(Protocol):
    """A loss over packed log-probabilities."""

    @property
    def columns(self) -> tuple[str, ...]:
        """Names of the figures, the same on every rank."""

    @property
    def needs_entropy_gradient(self) -> bool:
        """Whether the loss contains the entropy."""

    def trains(self, sample: Sample) -> bool:
        """Whether the sample has a gradient at all; the others are only measured."""

    def __call__(self, batch: PackedBatch, logprobs: TokenLogProbs) -> tuple[Tensor, Columns]:
        """The microbatch's share of the loss and each sample's figures."""


def denominators(samples: Sequence[Sample], max_response: int = 1) -> Denominators:
    """Of a global minibatch; every rank holds all of it, so they are known before the first forward pass."""
    return Denominators(sum(len(sample.response_ids) for sample in samples), len(samples), max_response)


def minibatch_ratios(samples: Sequence[Sample], log_pi: Sequence[FloatArray]) -> Ratios:
    """The importance ratios of a whole minibatch, on the host, in float64.

    Args:
        samples: All samples.
        log_pi: Log-probabilities (nats) of each one's response tokens under the policy.
    """

    def joined(arrays: Sequence[np.ndarray]) -> Tensor:
        return torch.from_numpy(np.concatenate(arrays, dtype=np.float64))

    old = [sample.log_old for sample in samples if sample.log_old is not None]
    return whole_ratios(
        joined(log_pi),
        joined([sample.log_mu for sample in samples]),
        joined(old) if len(old) == len(samples) else None,
        torch.from_numpy(np.repeat(np.arange(len(samples)), [len(values) for values in log_pi])),
        torch.tensor([sample.advantage for sample in samples], dtype=torch.float64),
    )


@dataclass(frozen=True)
class PolicyGradient:
    """The policy-gradient loss with a weight kernel, for one global minibatch.

    Attributes:
        weighting: From ratios to kappa.
        aggregation: Divisor of the loss.
        denominators: Sizes of the global minibatch.
        regularization: KL and entropy terms.
    """

    weighting: Weighting
    aggregation: Aggregation
    denominators: Denominators
    regularization: Regularization = NO_REGULARIZATION
    columns: ClassVar[tuple[str, ...]] = (
        "loss",
        "log_w",
        "log_drift",
        "phi",
        "abs_log_ratio",
        "max_abs_log_ratio",
        "entropy",
        "kl_ref",
        "tokens",
        NONFINITE,
    )

    @property
    def needs_entropy_gradient(self) -> bool:
        """Whether the loss contains the entropy."""
        return self.regularization.entropy_coef != 0

    def trains(self, sample: Sample) -> bool:
        """A sample of advantage 0 has no gradient but that of the regularization.

        Raises:
            UserError: Its advantage is not finite.
        """
        if not math.isfinite(sample.advantage):
            raise UserError(f"the advantage of sample {sample.name} is {sample.advantage}")
        return sample.advantage != 0 or self.regularization.is_on

    def __call__(self, batch: PackedBatch, logprobs: TokenLogProbs) -> tuple[Tensor, Columns]:
        """The microbatch's share of the loss and each sample's figures."""
        dtype = logprobs.log_pi.dtype
        inputs = PackedLogProbs(
            logprobs.log_pi,
            batch.log_mu.to(dtype),
            logprobs.entropy,
            batch.sample_index,
            batch.num_samples,
            None if batch.log_old is None else batch.log_old.to(dtype),
            None if batch.log_ref is None else batch.log_ref.to(dtype),
        )
        output = policy_loss(
            inputs, batch.advantages, self.weighting, self.aggregation, self.denominators, self.regularization
        )
        columns = (
            output.sample_loss,
            output.log_w,
            output.log_drift,
            output.kappa,
            output.sum_abs_log_ratio,
            output.max_abs_log_ratio,
            output.sum_entropy,
            output.sum_kl_ref,
            output.n_tokens,
            output.n_nonfinite,
        )
        return output.loss, dict(zip(self.columns, columns, strict=True))

    def check(self, table: Mapping[str, np.ndarray]) -> None:
        """Assert the bound of the weights, for all samples of the minibatch; a breach is a mistake in this program."""
        bound, largest = self.weighting.bound, float(table["phi"].max())
        if bound is not None and largest > bound * (1 + 1e-5):
            raise RuntimeError(f"a weight of {largest} is above its bound, {bound}")


@dataclass(frozen=True)
class NextToken:
    """Supervised next-token prediction: mean negative log-likelihood of the response tokens of the global minibatch."""

    denominators: Denominators
    columns: ClassVar[tuple[str, ...]] = ("loss", "correct", "tokens", NONFINITE)
    needs_entropy_gradient: ClassVar[bool] = False

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
