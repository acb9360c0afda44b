"""Held-out accuracy during training."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from megatron_vespo.metrics.measure import Values, evaluation_metrics
from megatron_vespo.rollout.sampling import SamplingParams
from megatron_vespo.rollout.service import RolloutService
from megatron_vespo.types import Prompt


@dataclass(frozen=True)
class Evaluator:
    """Samples and scores every evaluation set with the weights that the server has.

    Attributes:
        rollouts: Generates.
        sets: Prompts by the set's name.
        sampling: How to sample.
        samples_per_prompt: k of avg@k.
        interval: Steps between evaluations; 0: only after the last.
    """

    rollouts: RolloutService
    sets: Mapping[str, Sequence[Prompt]]
    sampling: SamplingParams
    samples_per_prompt: int
    interval: int

    def due(self, step: int, last_step: int) -> bool:
        """Whether to evaluate after this step."""
        return step == last_step or bool(self.interval and step % self.interval == 0)

    def run(self) -> Values:
        """Evaluate all sets. A collective; every rank gets the metrics."""
        values: Values = {}
        for name, prompts in self.sets.items():
            groups = self.rollouts.evaluate(prompts, self.samples_per_prompt, self.sampling)
            if not groups:  # asked to stop: half an evaluation is none
                return {}
            values.update(evaluation_metrics(name, groups))
        return values


class NoEvaluation:
    """Where there is no server to sample from."""

    def due(self, step: int, last_step: int) -> bool:
        """Never."""
        return False

    def run(self) -> Values:
        """No metrics."""
        return {}
