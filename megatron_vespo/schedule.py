"""How long a run is, and in what pieces it trains."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from megatron_vespo import parallel
from megatron_vespo.batching import MicrobatchPlan, plan_microbatches
from megatron_vespo.policy.packing import packed_length
from megatron_vespo.types import Sample


@dataclass(frozen=True)
class Schedule:
    """How long, and in what pieces.

    Attributes:
        steps: Rollout batches (RL) or optimizer steps (SFT).
        minibatches_per_step: N, optimizer steps on each rollout batch.
        max_tokens_per_microbatch: Packing limit.
        microbatch_multiple: The number of microbatches is a multiple of this.
        cost: FLOPs of a forward pass over a sequence of so many tokens; it balances the ranks.
        max_skipped_updates: Optimizer steps in a row that may be skipped for a bad gradient.
        staleness_bound: Most optimizer steps between sampling a token and training on it; None: whatever it is.
    """

    steps: int
    minibatches_per_step: int
    max_tokens_per_microbatch: int
    microbatch_multiple: int
    cost: Callable[[int], float]
    max_skipped_updates: int
    staleness_bound: int | None

    def plan(self, samples: Sequence[Sample]) -> MicrobatchPlan:
        """Microbatches of a minibatch for all data-parallel ranks."""
        return plan_microbatches(
            [packed_length(sample) for sample in samples],
            parallel.data_parallel_size(),
            self.max_tokens_per_microbatch,
            self.cost,
            names=[sample.name for sample in samples],
            multiple_of=self.microbatch_multiple,
        )

    def rank_plan(self, samples: Sequence[Sample]) -> Sequence[Sequence[int]]:
        """Microbatches of a minibatch for this rank."""
        return self.plan(samples).ranks[parallel.data_parallel_rank()]

    def flops(self, samples: Sequence[Sample]) -> float:
        """Operations of one update on them. The backward pass takes twice as many as the forward pass."""
        return 3.0 * sum(self.cost(packed_length(sample)) for sample in samples)

    def check_staleness(self, samples: Sequence[Sample], policy_version: int) -> None:
        """Assert the bound that admission keeps; a breach is a mistake in this program."""
        for sample in samples:
            staleness = sample.staleness(policy_version)
            if self.staleness_bound is not None and staleness > self.staleness_bound:
                raise RuntimeError(
                    f"sample {sample.name} is {staleness} updates old, more than (max_staleness + 1) *"
                    f" minibatches_per_step - 1 = {self.staleness_bound}"
                )
