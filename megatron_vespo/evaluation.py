"""Held-out accuracy: during training at an interval, and of a model by itself (``evaluate``)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Protocol

from megatron_vespo.metrics.evaluations import EvaluationSink, Scoring, SetResult, score_set, set_metrics
from megatron_vespo.metrics.measure import Values
from megatron_vespo.rollout.sampling import SamplingParams
from megatron_vespo.types import Prompt, SampleGroup


class Sampler(Protocol):
    """Where responses are sampled and scored; a RolloutService."""

    def evaluate(self, prompts: Sequence[Prompt], n: int, sampling: SamplingParams) -> list[SampleGroup]:
        """``n`` samples for each prompt; none where the run shall stop. A collective."""
        ...


@dataclass(frozen=True)
class EvaluationSet:
    """One set and how it is sampled.

    Attributes:
        name: Its metrics' and files'.
        prompts: On rank 0; empty elsewhere.
        samples_per_prompt: k of avg@k.
        sampling: How to sample.
    """

    name: str
    prompts: Sequence[Prompt]
    samples_per_prompt: int
    sampling: SamplingParams


@dataclass(frozen=True)
class Evaluator:
    """Samples and scores every evaluation set with the weights that the server has.

    Attributes:
        rollouts: Generates.
        sets: What is evaluated.
        interval: Steps between evaluations; 0: only after the last.
        scoring: How answers become results.
        sink: Where results and answers go; None on all ranks but 0.
    """

    rollouts: Sampler
    sets: Sequence[EvaluationSet]
    interval: int
    scoring: Scoring
    sink: EvaluationSink | None = None

    def due(self, step: int, last_step: int) -> bool:
        """Whether to evaluate after this step."""
        return step == last_step or bool(self.interval and step % self.interval == 0)

    def run(self, step: int) -> Values:
        """Evaluate all sets after a step. A collective; every rank gets the metrics."""
        results = self.evaluate(f"step_{step:06d}", {"step": step})
        values: Values = {}
        for name, result in results.items():
            values.update(set_metrics(name, result))
        return values

    def evaluate(self, label: str, facts: Mapping[str, Any]) -> dict[str, SetResult]:
        """Evaluate all sets, and write down what came out. A collective.

        Args:
            label: Names the files.
            facts: What else the results' file is to say.

        Returns:
            Results by set; none where the run was asked to stop.
        """
        results: dict[str, SetResult] = {}
        for part in self.sets:
            groups = self.rollouts.evaluate(part.prompts, part.samples_per_prompt, part.sampling)
            if not groups:  # asked to stop: half an evaluation is none
                return {}
            results[part.name] = score_set(groups, self.scoring)
            if self.sink is not None:
                self.sink.write_answers(label, part.name, groups)
        if self.sink is not None and results:
            sampling = {part.name: asdict(part.sampling) for part in self.sets}
            self.sink.write_results(label, results, sampling, self.scoring, facts)
        return results


class NoEvaluation:
    """Where there is no server to sample from."""

    def due(self, step: int, last_step: int) -> bool:
        """Never."""
        return False

    def run(self, step: int) -> Values:
        """No metrics."""
        return {}
