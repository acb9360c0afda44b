"""What a run did, update by update: the loop's own metrics are of whole steps, of which N = 64 has four."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager

import numpy as np

from megatron_vespo.metrics.measure import minibatch_metrics
from megatron_vespo.policy.figures import Measured
from megatron_vespo.policy.objectives import Objective
from megatron_vespo.policy.policy import Policy, StepResult
from megatron_vespo.types import FloatArray, Sample

# Columns of a cell's file that are metrics of a minibatch.
METRIC_COLUMNS = {
    "entropy": "train/entropy",
    "log_w_abs": "vespo/log_w_abs_mean",
    "ess_w": "vespo/ess_w",
    "ess_phi": "vespo/ess_phi",
    "phi_mean": "vespo/phi_mean",
    "phi_small_share": "vespo/phi_small_share",
    "staleness": "rollout/staleness_mean",
}
COLUMNS = ("reward", "grad_norm", "kl_per_token", "response_length", "router_flip_rate", *METRIC_COLUMNS)


class ObservedPolicy:
    """Stands where the loop has its policy, hands everything on, and writes down each update.

    Args:
        policy: The policy.
        measure: Measures held-out accuracy.
        every: Updates between measurements; one is made before the first.

    Attributes:
        history: A value for each update, by column.
        accuracy: Held-out accuracy: (updates made, share).
    """

    def __init__(self, policy: Policy, measure: Callable[[], float], every: int) -> None:
        self._policy, self._measure, self._every = policy, measure, every
        self._updates = 0
        self.history: dict[str, list[float | None]] = {name: [] for name in COLUMNS}
        self.accuracy = [(0, measure())]

    def forward_backward(
        self, samples: Sequence[Sample], plan: Sequence[Sequence[int]], objective: Objective
    ) -> Measured:
        """The policy's, and what it says of the samples."""
        measured = self._policy.forward_backward(samples, plan, objective)
        table, flips = measured.table, measured.tokens.router_flips
        metrics = minibatch_metrics(samples, table, self._updates)
        self._note(
            reward=float(np.mean([sample.reward for sample in samples])),
            # Of mu to pi, by the samples that mu drew: the mean of log mu - log pi.
            kl_per_token=float(-table["log_w"].sum() / max(table["tokens"].sum(), 1.0)),
            response_length=float(table["tokens"].mean()),
            router_flip_rate=None if flips is None else float(np.concatenate(flips).mean()),
            **{name: metrics[key] for name, key in METRIC_COLUMNS.items()},
        )
        return measured

    def optim_step(self) -> StepResult:
        """The policy's."""
        result = self._policy.optim_step()
        self._note(grad_norm=result.grad_norm)
        self._updates += 1
        if self._updates % self._every == 0:
            self.accuracy.append((self._updates, self._measure()))
        return result

    def log_probs(self, samples: Sequence[Sample], plan: Sequence[Sequence[int]]) -> list[FloatArray]:
        """The policy's."""
        return self._policy.log_probs(samples, plan)

    def reference(self) -> AbstractContextManager[None]:
        """The policy's."""
        return self._policy.reference()

    def _note(self, **values: float | None) -> None:
        for name, value in values.items():
            self.history[name].append(value if value is not None and math.isfinite(value) else None)
