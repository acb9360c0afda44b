"""Samples of one microbatch, packed without padding into one row of tokens.

Position p holds an input token and the token it must predict. A sample of P prompt and R response tokens takes
P + R - 1 positions (its last token is predicted, never fed), and its last R positions are its response rows. Only these
ever reach the output layer and the loss. Tokens that others inserted into the response (tools) are fed like a prompt's:
they take positions, and the rows are those before sampled tokens only. Samples that are trained on come first, so that
their rows do too.
A worked example, prompt [7], response [3] with advantage 0, then prompt [5, 9], response [8, 1], aligned to 6::

    tokens         5  9  8 | 7 | 0  0
    positions      0  1  2 | 0 | 0  1
    cu_seqlens     0         3   4     6       (the padding is a segment of its own)
    padding        .  .  . | . | x  x
    rows           1  2  3                     (positions in the row of tokens)
    targets        8  1  3
    sample_index   0  0  1                     (sample 0 here is number 1 of the minibatch)
    trained_rows   2
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from megatron.core.packed_seq_params import PackedSeqParams
from torch import Tensor

from megatron_vespo.types import UNKNOWN_EXPERT, Sample


@dataclass(frozen=True, slots=True)
class PackedBatch:
    """One microbatch on the device of the model. T positions, S samples, R response tokens.

    Attributes:
        tokens: Input tokens, [T] int64.
        positions: Position within the sample, [T] int64.
        padding: Whether a position belongs to no sample, [T] bool. All False in a microbatch without samples.
        packed_seq_params: Segment borders for attention.
        rows: Positions of the response tokens, sample after sample, [R] int64.
        targets: The response tokens, [R] int64.
        log_mu: Their behaviour log-probabilities (nats), [R] float32.
        sample_index: Which of the S samples each belongs to, ascending, [R] int64.
        trained_rows: The first so many rows have a gradient; the coefficient of the others is known to be 0.
        advantages: [S] float32.
        indices: Number of each sample in the global minibatch, [S] int64.
        log_old: Log-probabilities under the policy that began the step, [R] float32; None if the samples have none.
        log_ref: Under the reference policy, [R] float32; None if the samples have none.
        routed_experts: Experts that the sampler chose, [R, layers, experts a token] int16, negative where that is not
            known; None if it is not wanted, or known of no sample of the global minibatch.
    """

    tokens: Tensor
    positions: Tensor
    padding: Tensor
    packed_seq_params: PackedSeqParams
    rows: Tensor
    targets: Tensor
    log_mu: Tensor
    sample_index: Tensor
    trained_rows: int
    advantages: Tensor
    indices: Tensor
    log_old: Tensor | None
    log_ref: Tensor | None
    routed_experts: Tensor | None

    @property
    def num_samples(self) -> int:
        """S."""
        return len(self.indices)


def packed_length(sample: Sample) -> int:
    """Positions that a sample takes."""
    return max(sample.total_length - 1, 1)


def pack(
    samples: Sequence[Sample],
    indices: Sequence[int],
    *,
    trains: Callable[[Sample], bool],
    alignment: int,
    device: torch.device,
    routing: bool = False,
) -> PackedBatch:
    """Pack one microbatch.

    Args:
        samples: The samples of the global minibatch.
        indices: Those of this microbatch, by number.
        trains: Whether a sample has a gradient.
        alignment: T is padded to a multiple of this (``models.precision.packed_alignment``).
        device: Where the tensors go.
        routing: Whether the sampler's experts are wanted.
    """
    order = sorted(indices, key=lambda i: not trains(samples[i]))  # stable
    chosen = [samples[i] for i in order]
    lengths = [packed_length(sample) for sample in chosen]
    responses = [len(sample.response_ids) for sample in chosen]
    filled = sum(lengths)
    total = max(-(-filled // alignment), 1) * alignment  # a microbatch without samples is all padding
    tokens = np.zeros(total, dtype=np.int64)
    stops = np.cumsum(lengths, dtype=np.int64)
    for sample, start, stop in zip(chosen, stops - lengths, stops, strict=True):
        tokens[start:stop] = np.concatenate([sample.prompt.input_ids, sample.sequence_ids])[: stop - start]

    def tensor(array: np.ndarray, dtype: type) -> Tensor:
        return torch.from_numpy(np.ascontiguousarray(array, dtype=dtype)).to(device, non_blocking=True)

    def optional(arrays: Sequence[np.ndarray | None]) -> Tensor | None:
        given = [array for array in arrays if array is not None]
        return tensor(_joined(given), np.float32) if given and len(given) == len(arrays) else None

    routed = _routed_experts(samples, chosen) if routing else None
    ranges = [np.arange(length) for length in (*lengths, total - filled)]
    rows = [
        start + len(sample.prompt.input_ids) - 1 + sample.offsets
        for sample, start in zip(chosen, stops - lengths, strict=True)
    ]
    return PackedBatch(
        tokens=tensor(tokens, np.int64),
        positions=tensor(np.concatenate(ranges), np.int64),
        # A load-balancing loss over no token at all would be 0/0.
        padding=tensor(np.arange(total) >= (filled or total), np.bool_),
        packed_seq_params=_segments(lengths, total, device),
        rows=tensor(_joined(rows), np.int64),
        targets=tensor(_joined([sample.response_ids for sample in chosen]), np.int64),
        log_mu=tensor(_joined([sample.log_mu for sample in chosen]), np.float32),
        sample_index=tensor(np.repeat(np.arange(len(chosen)), responses), np.int64),
        trained_rows=sum(size for sample, size in zip(chosen, responses, strict=True) if trains(sample)),
        advantages=tensor(np.array([sample.advantage for sample in chosen]), np.float32),
        indices=tensor(np.array(order), np.int64),
        log_old=optional([sample.log_old for sample in chosen]),
        log_ref=optional([sample.log_ref for sample in chosen]),
        routed_experts=None if routed is None else tensor(routed, np.int16),
    )


def _joined(arrays: Sequence[np.ndarray]) -> np.ndarray:
    return np.concatenate(arrays) if arrays else np.zeros(0)


def _routed_experts(samples: Sequence[Sample], chosen: Sequence[Sample]) -> np.ndarray | None:
    shape = next((s.routed_experts.shape[1:] for s in samples if s.routed_experts is not None), None)
    if shape is None:
        return None
    lengths = [len(sample.response_ids) for sample in chosen]
    experts = np.full((sum(lengths), *shape), UNKNOWN_EXPERT, np.int16)
    for sample, stop, size in zip(chosen, np.cumsum(lengths, dtype=np.int64), lengths, strict=True):
        if sample.routed_experts is not None:
            experts[stop - size : stop] = sample.routed_experts
    return experts


def _segments(lengths: Sequence[int], total: int, device: torch.device) -> PackedSeqParams:
    """Borders of the samples; what is left of the row is one more segment."""
    borders = np.cumsum([0, *lengths, *([total - sum(lengths)] if total > sum(lengths) else [])], dtype=np.int32)
    cu_seqlens = torch.from_numpy(borders).to(device)
    longest = int(np.diff(borders).max())
    return PackedSeqParams(
        qkv_format="thd",
        cu_seqlens_q=cu_seqlens,
        cu_seqlens_kv=cu_seqlens,
        max_seqlen_q=longest,
        max_seqlen_kv=longest,
    )
