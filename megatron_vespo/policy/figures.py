"""What the ranks report of samples and tokens, summed once over all of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from megatron_vespo import parallel, platform
from megatron_vespo.errors import UserError
from megatron_vespo.policy.logprobs import TokenLogProbs
from megatron_vespo.policy.objectives import NONFINITE
from megatron_vespo.policy.packing import PackedBatch
from megatron_vespo.types import FloatArray, Sample

Table = dict[str, np.ndarray]
"""Figures of all samples of a minibatch by name, each [samples] float64, equal on all ranks."""


@dataclass(frozen=True, slots=True)
class TokenScores:
    """What the policy says of the response tokens of some samples, on every rank.

    Attributes:
        log_pi: Log-probabilities (nats), for each sample [R] float32.
        entropy: Entropies (nats) of the distributions that the tokens are of, for each sample [R] float32.
        router_flips: Share of each token's experts that trainer and sampler chose differently, for each sample [R]
            float32, NaN where the sampler's are not known; None: not compared.
    """

    log_pi: list[FloatArray]
    entropy: list[FloatArray]
    router_flips: list[FloatArray] | None = None


@dataclass(frozen=True, slots=True)
class Measured:
    """What was measured of a minibatch, on every rank.

    Attributes:
        table: Figures of its samples.
        tokens: Of their response tokens, under the weights that the gradient was taken at.
    """

    table: Table
    tokens: TokenScores


class Sums:
    """What the ranks report of samples and tokens, in one buffer: one sum over ranks, one wait of the host.

    Args:
        samples: All samples of the minibatch.
        rows: Figures of each, the last of which counts how often it was reported; 0: tokens only.
        flips: Count the routers' flips of each token as well.
    """

    def __init__(self, samples: Sequence[Sample], rows: int, flips: bool = False) -> None:
        lengths = np.array([len(sample.response_ids) for sample in samples])
        self._ends = np.cumsum(lengths)
        self._starts = torch.from_numpy(self._ends - lengths).to(platform.device())
        self._shape = (rows, len(samples))
        tokens = int(self._ends[-1])
        token_rows = 3 if flips else 2
        size = rows * len(samples) + token_rows * tokens
        # float64, which holds the tokens' float32 exactly.
        self._flat = torch.zeros(size, dtype=torch.float64, device=platform.device())
        self._table = self._flat[: rows * len(samples)].view(self._shape)
        self._tokens = self._flat[rows * len(samples) :].view(token_rows, tokens)

    def add_columns(self, batch: PackedBatch, columns: Sequence[Tensor]) -> None:
        """Put a microbatch's figures in their samples' places."""
        for row, values in zip(self._table, (*columns, torch.ones_like(batch.advantages)), strict=True):
            row[batch.indices] += values.double()

    def set_tokens(self, batch: PackedBatch, logprobs: TokenLogProbs) -> None:
        """Put what is known of a microbatch's tokens in their places."""
        place = self._places(batch)
        self._tokens[0, place] = logprobs.log_pi.detach().double()
        self._tokens[1, place] = logprobs.entropy.detach().double()

    def add_flips(self, batch: PackedBatch, flips: Tensor) -> None:
        """Add to the flips of a microbatch's tokens what some routers of this rank have counted, [R]."""
        self._tokens[2].index_add_(0, self._places(batch), flips.double())

    def over_ranks(self) -> tuple[np.ndarray, TokenScores]:
        """Rows of all samples, and the tokens: the one time that the host waits for the device.

        Flips are counts still.
        """
        flat = parallel.all_reduce_sum(self._flat).cpu().numpy()
        rows, samples = self._shape
        tokens = flat[rows * samples :].reshape(len(self._tokens), -1).astype(np.float32)
        scores = TokenScores(*(np.split(values, self._ends[:-1]) for values in tokens))
        return flat[: rows * samples].reshape(self._shape), scores

    def _places(self, batch: PackedBatch) -> Tensor:
        """Where a microbatch's tokens are among all, [R]."""
        first = torch.searchsorted(batch.sample_index, batch.sample_index)
        place = torch.arange(len(first), device=first.device) - first
        return place + self._starts[batch.indices[batch.sample_index]]


def checked_table(table: np.ndarray, columns: Sequence[str], samples: Sequence[Sample]) -> Table:
    """The table of all ranks, by name.

    Args:
        table: Rows of all samples, from ``Sums``.
        columns: Their names.
        samples: The samples.

    Raises:
        UserError: Log-probabilities of a sample are NaN or infinite.
    """
    *rows, reported = table
    if not (reported == 1).all():
        raise RuntimeError(f"samples reported by other than one rank: counts {reported.tolist()}")
    figures = dict(zip(columns, rows, strict=True))
    bad = figures.pop(NONFINITE) > 0
    if bad.any():
        names = ", ".join(sample.name for sample, spoilt in zip(samples, bad, strict=True) if spoilt)
        raise UserError(
            f"log-probabilities of response tokens are NaN or infinite in samples {names} (prompt/response); the"
            " weights have probably diverged: lower megatron.lr or go back to an earlier checkpoint"
        )
    return figures
