"""Samples of one microbatch, packed without padding into one row of tokens.

Position p holds an input token and the token it must predict. A sample of P prompt and R response tokens takes
P + R - 1 positions (its last token is predicted, never fed), and its last R positions are response positions.
A worked example, prompt [5, 9], response [8, 1], then prompt [7], response [3], aligned to 6::

    tokens        5  9  8 | 7 | 0  0
    targets       9  8  1 | 3 | 0  0
    mask          .  x  x | x | .  .
    sample_index  0  0  0 | 1 | -1 -1
    cu_seqlens    0        3   4     6       (the padding is a segment of its own)
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from megatron.core.packed_seq_params import PackedSeqParams
from torch import Tensor

from megatron_vespo.types import Sample


@dataclass(frozen=True, slots=True)
class PackedBatch:
    """One microbatch on the device of the model. T positions, S samples.

    Attributes:
        tokens: Input tokens, [T] int64.
        targets: Token to predict at each position, [T] int64; 0 in padding.
        positions: Position within the sample, [T] int64.
        mask: Whether the target is a response token, [T] bool.
        sample_index: Which of the S samples a position belongs to, [T] int64; -1 in padding.
        log_mu: Behaviour log-probability of the target where ``mask``, [T] float32.
        advantages: [S] float32.
        indices: Number of each sample in the global minibatch, [S] int64.
        names: Their names, for messages.
        packed_seq_params: Segment borders for attention.
    """

    tokens: Tensor
    targets: Tensor
    positions: Tensor
    mask: Tensor
    sample_index: Tensor
    log_mu: Tensor
    advantages: Tensor
    indices: Tensor
    names: tuple[str, ...]
    packed_seq_params: PackedSeqParams

    @property
    def num_samples(self) -> int:
        """S."""
        return len(self.names)


def packed_length(sample: Sample) -> int:
    """Positions that a sample takes."""
    return max(sample.total_length - 1, 1)


def pack(samples: Sequence[Sample], indices: Sequence[int], *, alignment: int, device: torch.device) -> PackedBatch:
    """Pack one microbatch.

    Args:
        samples: The samples of the global minibatch.
        indices: Those of this microbatch, by number.
        alignment: T is padded to a multiple of this (tensor-parallel size under sequence parallelism, 16 for FP8).
        device: Where the tensors go.
    """
    chosen = [samples[i] for i in indices]
    lengths = [packed_length(sample) for sample in chosen]
    filled = sum(lengths)
    total = max(-(-filled // alignment), 1) * alignment  # a microbatch without samples is all padding
    tokens, targets, positions = (np.zeros(total, dtype=np.int64) for _ in range(3))
    mask = np.zeros(total, dtype=bool)
    owner = np.full(total, -1, dtype=np.int64)
    log_mu = np.zeros(total, dtype=np.float32)
    start = 0
    for number, (sample, length) in enumerate(zip(chosen, lengths, strict=True)):
        stop, size = start + length, len(sample.response_ids)
        ids = np.concatenate([sample.prompt.input_ids, sample.response_ids])
        tokens[start:stop] = ids[:length]
        targets[start : start + len(ids) - 1] = ids[1:]
        positions[start:stop] = np.arange(length)
        owner[start:stop] = number
        mask[stop - size : stop] = True
        log_mu[stop - size : stop] = sample.log_mu
        start = stop
    positions[filled:] = np.arange(total - filled)
    borders = np.cumsum([0, *lengths, *([total - filled] if total > filled else [])])
    longest = int(np.diff(borders).max())
    cu_seqlens = torch.from_numpy(borders.astype(np.int32)).to(device)

    def tensor(array: np.ndarray) -> Tensor:
        return torch.from_numpy(array).to(device)

    return PackedBatch(
        tokens=tensor(tokens),
        targets=tensor(targets),
        positions=tensor(positions),
        mask=tensor(mask),
        sample_index=tensor(owner),
        log_mu=tensor(log_mu),
        advantages=torch.tensor([sample.advantage for sample in chosen], dtype=torch.float32, device=device),
        indices=torch.tensor(list(indices), dtype=torch.int64, device=device),
        names=tuple(sample.name for sample in chosen),
        packed_seq_params=PackedSeqParams(
            qkv_format="thd",
            cu_seqlens_q=cu_seqlens,
            cu_seqlens_kv=cu_seqlens,
            max_seqlen_q=longest,
            max_seqlen_kv=longest,
        ),
    )
