"""What is known of each response token of a batch, side by side; what health figures and diagnosis are made from."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from megatron_vespo.types import FloatArray, Sample

Doubles = NDArray[np.float64]
Bools = NDArray[np.bool_]
Ints = NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class Tokens:
    """The T response tokens of S samples, sample after sample.

    Attributes:
        log_mu: Log-probability that the sampler reported (nats), [T] float32.
        log_pi: Log-probability under the trainer's policy (nats), [T] float32.
        entropy: Entropy of that policy where the token was drawn (nats), [T] float32.
        staleness: Optimizer steps between the weights that sampled the token and the policy, [T].
        after_push: Whether weights were pushed within the response before this token, [T].
        lengths: Tokens of each sample, [S]; they may be 0.
        router_flips: Share of the token's experts that trainer and sampler chose differently, [T]; NaN where the
            sampler's are not known, None where nothing is.
    """

    log_mu: FloatArray
    log_pi: FloatArray
    entropy: FloatArray
    staleness: Ints
    after_push: Bools
    lengths: Ints
    router_flips: FloatArray | None = None

    def __len__(self) -> int:
        return len(self.log_mu)

    @property
    def log_ratio(self) -> Doubles:
        """Log of pi / mu of each token (nats), [T]."""
        return self.log_pi.astype(np.float64) - self.log_mu

    @property
    def sample_index(self) -> Ints:
        """Sample of each token, [T]."""
        return np.repeat(np.arange(len(self.lengths)), self.lengths)

    @property
    def position(self) -> Ints:
        """Number of each token within its response, from 0, [T]."""
        ends = np.cumsum(self.lengths)
        return np.arange(len(self)) - np.repeat(ends - self.lengths, self.lengths)

    def of_sample(self, values: NDArray[np.generic]) -> NDArray[np.generic]:
        """A value of each sample, [S], given to its tokens, [T]."""
        return np.repeat(values, self.lengths)

    def per_sample(self, values: Doubles) -> Doubles:
        """Sum of the tokens' values over each sample, [S]."""
        if not len(values):
            return np.zeros(len(self.lengths))
        present = self.lengths > 0
        totals = np.zeros(len(self.lengths))
        totals[present] = np.add.reduceat(values, (np.cumsum(self.lengths) - self.lengths)[present])
        return totals


def gather_tokens(
    samples: Sequence[Sample],
    log_mu: Sequence[FloatArray],
    log_pi: Sequence[FloatArray],
    entropy: Sequence[FloatArray],
    policy_version: int,
    router_flips: Sequence[FloatArray] | None = None,
) -> Tokens:
    """The tokens of some samples.

    Args:
        samples: The samples.
        log_mu: What the sampler reported of each one's tokens.
        log_pi: What the trainer says of them.
        entropy: Of its policy there.
        policy_version: Version of that policy.
        router_flips: Of each one's tokens, where compared.
    """
    versions = _joined([sample.weight_versions for sample in samples], np.int64)
    lengths = np.array([len(sample.response_ids) for sample in samples], np.int64)
    first = np.array([s.weight_versions[0] if len(s.weight_versions) else 0 for s in samples], np.int64)
    return Tokens(
        _joined(log_mu, np.float32),
        _joined(log_pi, np.float32),
        _joined(entropy, np.float32),
        policy_version - versions,
        versions > np.repeat(first, lengths),
        lengths,
        None if router_flips is None else _joined(router_flips, np.float32),
    )


def join_tokens(parts: Sequence[Tokens]) -> Tokens:
    """The tokens of several minibatches. Router flips are known where all know them."""
    flips = [part.router_flips for part in parts]
    known = [values for values in flips if values is not None]
    return Tokens(
        np.concatenate([part.log_mu for part in parts]),
        np.concatenate([part.log_pi for part in parts]),
        np.concatenate([part.entropy for part in parts]),
        np.concatenate([part.staleness for part in parts]),
        np.concatenate([part.after_push for part in parts]),
        np.concatenate([part.lengths for part in parts]),
        np.concatenate(known) if known and len(known) == len(flips) else None,
    )


def _joined(arrays: Sequence[NDArray], dtype: type) -> NDArray:
    return np.concatenate([*arrays, np.zeros(0)]).astype(dtype)
